from __future__ import annotations

from typing import Any

import pytest

from llmc.passes.base import Context
from llmc.passes.fuse.fuse_group_norm import FuseGroupNorm

HEAD = (
    "(float[{x}] x) => (float[{x}] y{more}) <int64[{n}] grouped = {{{grouped}}}, int64[4] back = {{{back}}}, "
    "float[{g}] s = {{{ones}}}, float[{g}] t = {{{zeros}}}, float[{w}] w = {{1,2,3,4}}, float[{w}] b = {{4,3,2,1}}> "
    "{{ r = Reshape(x, grouped) n = InstanceNormalization<epsilon=0.001>(r, s, t) {body} }}"
)
AFFINE = "z = Shape(x) q = Reshape(n, z) m = Mul(q, w) y = Add(m, b)"


def model(body: str = AFFINE, **keys: str) -> str:
    values = {
        "x": "N,4,3,3", "grouped": "0,2,-1", "back": "0,4,3,3", "n": "3", "g": "2", "ones": "1,1", "zeros": "0,0",
        "w": "4,1,1", "more": "",
    }  # fmt: skip
    return HEAD.format(body=body, **(values | keys))


CONSTANT = "q = Reshape(n, back) m = Mul(q, w) y = Add(m, b)"

FIRES = {
    "torch": (model(), ["GroupNormalization"]),
    "spatial sizes are not known": (model(x="N,4,H,W"), ["GroupNormalization"]),
    "shape is constant": (model(CONSTANT), ["GroupNormalization"]),
    "scale and bias first": (
        model("z = Shape(x) q = Reshape(n, z) m = Mul(w, q) y = Add(b, m)"),
        ["GroupNormalization"],
    ),
    "numbers for each group": (model(ones="2,3", zeros="1,-1"), ["GroupNormalization"]),
    "without scale and bias": (model("z = Shape(x) y = Reshape(n, z)"), ["GroupNormalization"]),
    "four axes for the groups": (model(grouped="0,2,2,-1", n="4"), ["GroupNormalization"]),
    "first axis found out": (model(x="2,4,3,3", grouped="-1,2,18", back="2,4,3,3"), ["GroupNormalization"]),
    "shape has other readers": (
        model(AFFINE + " v = Identity(z)", more=", int64[4] v"),
        ["Shape", "GroupNormalization", "Identity"],
    ),
}

LEAVES_ALONE = {
    "channels are not known": (model(x="N,C,3,3"), "the channels of 'x' are not known"),
    "groups across samples": (
        model(x="2,4,3,3", grouped="1,4,-1", g="4", ones="1,1,1,1", zeros="0,0,0,0"),
        "'grouped' is [1, 4, -1]: the first axis of 'x', [2, 4, 3, 3], must stay",
    ),
    "channels cut": (
        model(grouped="0,3,-1", g="3", ones="1,1,1", zeros="0,0,0"),
        "'grouped' is [0, 3, -1]: not whole groups of the 4 channels",
    ),
    "another shape behind": (
        model("q = Reshape(n, back) y = Identity(q)", back="0,2,6,3"),
        "'back' is [0, 2, 6, 3]: the shape of 'x', ['N', 4, 3, 3], must come back",
    ),
    "normalised tensor is an output": (
        model(more=", float[N,2,M] n"),
        "'n', inside the pattern, is an output of the graph",
    ),
    "normalised tensor has a second user": (
        model(AFFINE + " v = Relu(n)", more=", float[N,2,M] v"),
        "'n', inside the pattern, is also used by Relu 'v'",
    ),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, fires: Any) -> None:
    fires(FuseGroupNorm(), *FIRES[name], opset=18)


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, leaves_alone: Any) -> None:
    leaves_alone(FuseGroupNorm(), *LEAVES_ALONE[name], opset=18)


def test_scale_along_another_axis_stays_outside(fires: Any) -> None:
    fires(FuseGroupNorm(), model(x="N,4,1,4", w="4"), ["GroupNormalization", "Mul", "Add"], opset=18)


def test_shared_shape_serves_two_normalisations(parse: Any) -> None:
    graph = parse(
        "(float[N,4,3] x) => (float[N,4,3] y, float[N,4,3] v) <int64[3] grouped = {0,2,-1}, float[2] s = {1,1}, "
        "float[2] t = {0,0}> { z = Shape(x) a = Reshape(x, grouped) n = InstanceNormalization(a, s, t) "
        "y = Reshape(n, z) b = Reshape(x, grouped) p = InstanceNormalization(b, s, t) v = Reshape(p, z) }",
        opset=18,
    )
    FuseGroupNorm().run(graph, Context())
    assert [node.op for node in graph.nodes if node.op != "Shape"] == ["GroupNormalization", "GroupNormalization"]


def test_fires_inside_a_subgraph(parse: Any) -> None:
    graph = parse(
        "(bool c, float[2,4,3] x) => (float[2,4,3] y) <int64[3] grouped = {0,2,-1}, float[2] s = {1,1}, "
        "float[2] t = {0,0}> { y = If (c) <then_branch = g () => (float[2,4,3] ty) { a = Abs(x) "
        "r = Reshape(a, grouped) n = InstanceNormalization(r, s, t) z = Shape(a) ty = Reshape(n, z) },"
        " else_branch = f () => (float[2,4,3] fy) { fy = Identity(x) }> }",
        opset=21,
    )
    FuseGroupNorm().run(graph, Context())
    assert [node.op for node in graph.nodes[0].attrs["then_branch"].nodes] == ["Abs", "GroupNormalization"]
