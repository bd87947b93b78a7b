from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.fuse.fuse_rms_norm import FuseRMSNorm
from llmc.passes.graph import constants, copy_graph

HEAD = "(float[N,4] x) => (float[N,4] y{more}) <float two = {{{two}}}, float e = {{0.00001}}, float[4] w = {{1,2,3,4}}>"
MEAN = "s = Pow(x, two) m = ReduceMean<axes=[{axes}]>(s) a = Add(m, e) r = Sqrt(a) "


def model(body: str, axes: str = "-1", two: float = 2.0, more: str = "") -> str:
    return HEAD.format(two=two, more=more) + "{" + MEAN.format(axes=axes) + body + "}"


SCALED = "i = Reciprocal(r) n = Mul(x, i) y = Mul(w, n)"

FIRES = {
    "Llama": model(SCALED),
    "Div": model("n = Div(x, r) y = Mul(n, w)"),
    "no scale": model("y = Div(x, r)"),
    "last axis by its number": model(SCALED, axes="1"),
    "scale with an axis more": model("n = Div(x, r) y = Mul(n, w)").replace("float[4] w", "float[1,4] w"),
}

LEAVES_ALONE = {
    "first axis": (model(SCALED, axes="0"), "the mean is over axes [0] of 'x', not over its last ones"),
    "cube": (model(SCALED, two=3), "'two' is 3, RMSNormPlain needs 2"),
    "mean is an output": (
        model(SCALED, more=", float[N,1] m"),
        "'m', inside the pattern, is an output of the graph",
    ),
    "root has a second user": (
        model(SCALED + " z = Relu(r)", more=", float[N,1] z"),
        "'r', inside the pattern, is also used by Relu 'z'",
    ),
    "another numerator": (
        model("p = Relu(x) y = Div(p, r)"),
        "'x' stands where 'p' must stand again (x)",
    ),
    "layer normalisation": (
        HEAD.format(two=2, more="") + "{ u = ReduceMean<axes=[-1]>(x) d = Sub(x, u) s = Pow(d, two) "
        "m = ReduceMean<axes=[-1]>(s) a = Add(m, e) r = Sqrt(a) n = Div(d, r) y = Mul(n, w) }",
        "'d' is centred: a layer normalisation, which fuse-layer-norm takes",
    ),
    "float64": (
        model(SCALED).replace("float[", "double[").replace("float ", "double "),
        "the type of 'x' is float64, the fused operator computes in float32",
    ),
}

WIDENED = (
    "(float16[N,4] x) => (float16[N,4] y) <float two = {2}, float e = {0.00001}, float[4] w = {W}, "
    "float[4] f = {1,2,3,4}, int64[1] axes = {-1}> { h = Cast<to=10>(f) c = Cast<to=1>(x) s = Pow(c, two) "
    "m = ReduceMean(s, axes) a = Add(m, e) r = Sqrt(a) n = Div(c, r) TAIL }"
)


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, fires: Any) -> None:
    assert len(fires(FuseRMSNorm(), FIRES[name], ["RMSNormalization"], opset=17).rewrites) == 1


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, leaves_alone: Any) -> None:
    leaves_alone(FuseRMSNorm(), *LEAVES_ALONE[name], opset=17)


@pytest.mark.parametrize(
    ("tail", "scale", "left"),
    [
        pytest.param("d = Cast<to=10>(n) y = Mul(h, d)", "1,1,1,1", ["RMSNormalization"], id="Llama"),
        pytest.param("p = Mul(n, w) y = Cast<to=10>(p)", "1,1.5,2,0.25", ["RMSNormalization"], id="Gemma"),
        pytest.param("y = Cast<to=10>(n)", "1,1,1,1", ["RMSNormalization"], id="no scale"),
        # 1.0001 is no float16: the product stays in float32
        pytest.param(
            "p = Mul(n, w) y = Cast<to=10>(p)", "1,1.0001,2,0.25", ["Cast", "RMSNormalization", "Cast"], id="fine scale"
        ),
        pytest.param("d = Cast<to=16>(n) y = Cast<to=10>(d)", "1,1,1,1", ["Cast", "RMSNormalization", "Cast", "Cast"],
                     id="another type behind"),
    ],
)  # fmt: skip
def test_casts_around_it(tail: str, scale: str, left: list[str], parse: Any, random_feeds: Any) -> None:
    graph = parse(WIDENED.replace("W", scale).replace("TAIL", tail), opset=23)
    fused = copy_graph(graph)
    FuseRMSNorm().run(fused, Context())
    assert [node.op for node in fused.nodes if node.outputs[0].name != "h"] == left
    feeds = random_feeds(graph)
    expected, found = (Session(g).run(feeds)["y"].astype(np.float64) for g in (graph, fused))
    # two roundings to float16, 2^-11 each, of values below 8
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 * 8 * 2.0**-11)


def test_overflow_of_the_square_in_float16_is_cured(parse: Any) -> None:
    graph = parse(model(SCALED), opset=17)
    for tensor in (*graph.inputs, *graph.outputs):
        tensor.dtype = np.dtype(np.float16)
    for constant in constants(graph):
        constant.values = constant.values.astype(np.float16)
    fused = copy_graph(graph)
    FuseRMSNorm().run(fused, Context())
    x = np.array([[1000.0, -1000.0, 1000.0, 1000.0]], np.float16)
    # 1000² is beyond float16's 65504: the long form divides by infinity
    np.testing.assert_array_equal(Session(graph).run({"x": x})["y"], np.zeros((1, 4)))
    np.testing.assert_array_equal(Session(fused).run({"x": x})["y"], [[1, -2, 3, 4]])


def test_fires_inside_a_subgraph(parse: Any) -> None:
    graph = parse(
        "(bool c, float[2,4] x) => (float[2,4] y) <float two = {2}, float e = {0.00001}, float[4] w = {1,2,3,4}> {"
        "y = If (c) <then_branch = t () => (float[2,4] ty) {"
        + MEAN.format(axes="-1")
        + "n = Div(x, r) ty = Mul(n, w) }"
        ", else_branch = f () => (float[2,4] ty) { ty = Identity(x) }> }",
        opset=17,
    )
    assert len(FuseRMSNorm().run(graph, Context()).rewrites) == 1
    assert [node.op for node in graph.nodes[0].attrs["then_branch"].nodes] == ["RMSNormalization"]
