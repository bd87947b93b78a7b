from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.fuse.fuse_clip import FuseClip
from llmc.passes.graph import copy_graph

HEAD = (
    "(float[N,4] x{inputs}) => (float[N,4] y{more}) <float zero = {{0}}, float low = {{-0.5}}, float high = {{0.75}}, "
    "float lower = {{-1}}, float higher = {{2}}, float top = {{inf}}>"
)


def model(body: str, more: str = "", inputs: str = "") -> str:
    return HEAD.format(more=more, inputs=inputs) + "{" + body + "}"


BOTH = "m = Max(x, low) y = Min(m, high)"

FIRES = {
    "maximum first": (model(BOTH), ["Clip"], 20),
    "minimum first": (model("m = Min(high, x) y = Max(low, m)"), ["Clip"], 20),
    "Relu from Max": (model("y = Max(zero, x)"), ["Relu"], 20),
    "Relu and Min": (model("r = Relu(x) y = Min(r, high)"), ["Clip"], 20),
    "Max with 0 and Min": (model("r = Max(x, zero) y = Min(r, high)"), ["Clip"], 20),
    "Relu, then Clip": (model("r = Relu(x) y = Clip(r, low, high)"), ["Clip"], 20),
    "Clip, then Relu": (model("c = Clip(x, low, high) y = Relu(c)"), ["Clip"], 20),
    "Clip, then Clip": (model("c = Clip(x, low, high) y = Clip(c, lower, higher)"), ["Clip"], 20),
    "one bound each": (model("c = Clip(x, low) y = Clip(c, , high)"), ["Clip"], 20),
    "Clip with attributes": (model("c = Clip<min=-0.5>(x) y = Clip<max=0.75>(c)"), ["Clip"], 10),
    "Clip, then Min": (model("c = Clip(x, low, higher) y = Min(high, c)"), ["Clip"], 20),
    "Clip, then Max": (model("c = Clip(x, lower, high) y = Max(c, low)"), ["Clip"], 20),
    "Clip, then Min below all of it": (model("c = Clip(x, zero, high) y = Min(c, low)"), ["Clip"], 20),
    "Clip, then Max above all of it": (model("c = Clip(x, lower, low) y = Max(c, high)"), ["Clip"], 20),
    "Clip without a bound, then Min": (model("c = Clip(x, low) y = Min(c, high)"), ["Clip"], 20),
    "Min, then Clip": (model("m = Min(x, high) y = Clip(m, low, higher)"), ["Clip"], 20),
    "Max, then Clip": (model("m = Max(x, low) y = Clip(m, lower, high)"), ["Clip"], 20),
    "Min, then Clip above it": (model("m = Min(x, low) y = Clip(m, zero, high)"), ["Clip"], 20),
    "Max, then Clip below it": (model("m = Max(x, high) y = Clip(m, lower, low)"), ["Clip"], 20),
    "Min, then Relu": (model("m = Min(x, high) y = Relu(m)"), ["Clip"], 20),
    "Min of another Min and a Max": (model("m = Max(x, low) n = Min(m, higher) y = Min(n, high)"), ["Clip"], 20),
    "three in a row": (model("r = Relu(x) c = Clip(r, low, higher) y = Clip(c, lower, high)"), ["Clip"], 20),
    "Relu twice": (model("r = Relu(x) y = Relu(r)"), ["Relu"], 20),
}

LEAVES_ALONE = {
    "bounds that cross": (
        model("m = Max(x, high) y = Min(m, low)"),
        "the bounds 0.75 and -0.5 leave nothing between them",
    ),
    "bound below zero behind Relu": (
        model("r = Relu(x) y = Min(r, low)"),
        "the bounds 0.0 and -0.5 leave nothing between them",
    ),
    "bounds that cross in Clip before Min": (
        model("c = Clip(x, high, low) y = Min(c, higher)"),
        "the bounds 0.75 and -0.5 leave nothing between them",
    ),
    "infinite bounds": (
        model("m = Max(x, top) y = Min(m, top)"),
        "a bound of inf and inf is infinite, where Clip without one stops at the largest number",
    ),
    "Min below zero before Relu": (
        model("m = Min(x, low) y = Relu(m)"),
        "the bounds 0.0 and -0.5 leave nothing between them",
    ),
    "bound is a tensor": (
        model("m = Max(x, z) y = Min(m, high)", inputs=", float[N,4] z"),
        "'z' is not a constant, where a constant number is needed",
    ),
    "bound of Clip is computed": (
        model("c = Clip(x, z) y = Relu(c)", inputs=", float z"),
        "Clip 'c' computes its min",
    ),
    "inner tensor is an output": (
        model(BOTH, more=", float[N,4] m"),
        "'m', inside the pattern, is an output of the graph",
    ),
    "inner tensor has a second user": (
        model(BOTH + " z = Abs(m)", more=", float[N,4] z"),
        "'m', inside the pattern, is also used by Abs 'z'",
    ),
    "integers": (
        "(int64[N] x) => (int64[N] y) <int64 low = {0}, int64 high = {7}> { m = Max(x, low) y = Min(m, high) }",
        "'x' is not floating",
    ),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, fires: Any) -> None:
    text, operators, opset = FIRES[name]
    fires(FuseClip(), text, operators, opset=opset)


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, leaves_alone: Any) -> None:
    leaves_alone(FuseClip(), *LEAVES_ALONE[name])


@pytest.mark.parametrize("name", [name for name in FIRES if FIRES[name][2] == 20])
def test_nan_and_infinity_stay_what_they_were(name: str, parse: Any) -> None:
    graph = parse(FIRES[name][0])
    fused = copy_graph(graph)
    FuseClip().run(fused, Context())
    x = np.array([[np.nan, np.inf, -np.inf, -0.25]], np.float32)
    np.testing.assert_array_equal(Session(fused).run({"x": x})["y"], Session(graph).run({"x": x})["y"])


def test_fires_inside_a_subgraph(parse: Any) -> None:
    graph = parse(
        "(bool c, float[2,4] x) => (float[2,4] y) <float zero = {0}> { y = If (c) "
        "<then_branch = t () => (float[2,4] ty) { a = Abs(x) ty = Max(a, zero) },"
        " else_branch = f () => (float[2,4] fy) { fy = Identity(x) }> }"
    )
    FuseClip().run(graph, Context())
    assert [node.op for node in graph.nodes[0].attrs["then_branch"].nodes] == ["Abs", "Relu"]
