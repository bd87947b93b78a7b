from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.fuse.fuse_batch_norm import FuseBatchNorm
from llmc.passes.graph import Derived, constants, copy_graph

STATISTICS = "float[2] s = {1,-2}, float[2] t = {0.5,1}, float[2] m = {0.25,-1}, float[2] v = {{{v}}}"
HEAD = (
    "(float[N,2,3,3] x) => (float[N,2,A,B] y{more}) <float[{w}] w = {{{weights}}}, float[2] b = {{3,-3}}, {statistics}>"
)


def model(body: str, w: str = "2,2,1,1", weights: str = "1,2,3,4", v: str = "1,4", more: str = "") -> str:
    statistics = STATISTICS.replace("{{{v}}}", f"{{{v}}}")
    return HEAD.format(w=w, weights=weights, statistics=statistics, more=more) + "{" + body + "}"


def matrices(body: str) -> str:
    return model(body, w="2,2").replace("N,2,3,3", "N,2").replace("N,2,A,B", "N,2")


NORM = "y = BatchNormalization<epsilon=0.001>(c, s, t, m, v)"

FIRES = {
    "Conv": (model(f"c = Conv(x, w) {NORM}"), ["Conv"]),
    "Conv with bias": (model(f"c = Conv(x, w, b) {NORM}"), ["Conv"]),
    "grouped Conv": (model(f"c = Conv<group=2>(x, w) {NORM}", w="2,1,2,1"), ["Conv"]),
    "Conv with strides and padding": (model(f"c = Conv<strides=[2,1], pads=[1,0,1,0]>(x, w) {NORM}"), ["Conv"]),
    "ConvTranspose": (model(f"c = ConvTranspose(x, w, b) {NORM}"), ["ConvTranspose"]),
    "grouped ConvTranspose": (model(f"c = ConvTranspose<group=2>(x, w) {NORM}", w="2,1,2,1"), ["ConvTranspose"]),
    "Gemm": (matrices(f"c = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, b) {NORM}"), ["Gemm"]),
    "MatMul": (matrices(f"c = MatMul(x, w) {NORM}"), ["Gemm"]),
}

LEAVES_ALONE = {
    "Conv's result has a second user": (
        model(f"c = Conv(x, w) {NORM} z = Relu(c)", more=", float[N,2,A,B] z"),
        "'c', inside the pattern, is also used by Relu 'z'",
    ),
    "Conv's result is an output": (
        model(f"c = Conv(x, w) {NORM}", more=", float[N,2,A,B] c"),
        "'c', inside the pattern, is an output of the graph",
    ),
    "variance below zero": (
        model(f"c = Conv(x, w) {NORM}", v="-1,4"),
        "the bias would leave the range of float32",
    ),
    "training": (
        model("c = Conv(x, w) y, rm, rv = BatchNormalization<training_mode=1>(c, s, t, m, v)"),
        "BatchNormalization 'y' has training_mode 1, BatchNormConv needs 0",
    ),
    "weights are computed": (
        model(f"u = Relu(w) c = Conv(x, u) {NORM}"),
        "'u' is not a constant",
    ),
    "MatMul of more axes": (
        model(f"c = MatMul(x, w) {NORM}", w="3,3", weights="1,2,3,4,5,6,7,8,9"),
        "'x' and 'w' are not both matrices",
    ),
    "nothing before it": (model("c = Relu(x) " + NORM), "'c' comes from Relu 'c', where Conv is needed"),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, fires: Any) -> None:
    fires(FuseBatchNorm(), *FIRES[name])


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, leaves_alone: Any) -> None:
    leaves_alone(FuseBatchNorm(), *LEAVES_ALONE[name])


def test_weights_are_computed_when_asked_for(parse: Any) -> None:
    graph = parse(FIRES["Conv"][0])
    FuseBatchNorm().run(graph, Context())
    weight = graph.nodes[0].inputs[1]
    assert isinstance(weight._values, Derived)
    factor = np.array([1.0, -2.0]) / np.sqrt(np.array([1.0, 4.0]) + 0.001)
    expected = np.array([[1.0, 2.0], [3.0, 4.0]]) * factor[:, None]
    np.testing.assert_array_equal(weight._values.load().reshape(2, 2), expected.astype(np.float32))


def test_float16_weights_that_would_overflow_stay(parse: Any) -> None:
    text = model(f"c = Conv(x, w) {NORM}", weights="1000,2,3,4", v="0,4")
    graph = parse(text.replace("float[2] s = {1,", "float[2] s = {9,"))
    for tensor in (*graph.inputs, *graph.outputs):
        tensor.dtype = np.dtype(np.float16)
    for constant in constants(graph):
        constant.values = constant.values.astype(np.float16)
    before = copy_graph(graph)
    result = FuseBatchNorm().run(graph, Context())
    # 1000 · 9 / √0.001 is 284,605; float16 ends at 65,504
    assert "'w' would leave the range of float16" in [miss.reason for miss in result.near_misses]
    feeds = {"x": np.ones((1, 2, 3, 3), np.float16)}
    np.testing.assert_array_equal(Session(graph).run(feeds)["y"], Session(before).run(feeds)["y"])


def test_fires_inside_a_subgraph(parse: Any) -> None:
    statistics = STATISTICS.replace("{{{v}}}", "{1,4}")
    graph = parse(
        f"(bool k, float[1,2,3,3] x) => (float[1,2,3,3] y) <float[2,2,1,1] w = {{1,2,3,4}}, {statistics}> {{"
        " y = If (k) "
        "<then_branch = g () => (float[1,2,3,3] ty) { c = Conv(x, w) ty = BatchNormalization(c, s, t, m, v) },"
        " else_branch = f () => (float[1,2,3,3] fy) { fy = Identity(x) }> }"
    )
    FuseBatchNorm().run(graph, Context())
    assert [node.op for node in graph.nodes[0].attrs["then_branch"].nodes] == ["Conv"]
