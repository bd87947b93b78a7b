from __future__ import annotations

from typing import Any

import pytest

from llmc.passes.base import Context
from llmc.passes.fuse.fuse_conv import FuseConv

HEAD = (
    "(float[N,2,3,3] x) => (float[N,2,A,B] y{more}) <float[{w}] w = {{1,2,3,4}}, float[2] b = {{3,-3}}, "
    "float[{k}] k = {{{values}}}, int64[8] pads = {{{pads}}}, float zero = {{{zero}}}>"
)


def model(body: str, w: str = "2,2,1,1", k: str = "2,1,1", values: str = "2,-1", **keys: str) -> str:
    rest = {"more": "", "pads": "0,0,1,2,0,0,0,1", "zero": "0"} | keys
    return HEAD.format(w=w, k=k, values=values, **rest) + "{" + body + "}"


FIRES = {
    "factor": (model("c = Conv(x, w) y = Mul(c, k)"), ["Conv"]),
    "factor and bias": (model("c = Conv(x, w, b) y = Mul(k, c)"), ["Conv"]),
    "factor with all axes": (model("c = Conv(x, w) y = Mul(c, k)", k="1,2,1,1"), ["Conv"]),
    "one factor": (model("c = Conv(x, w) y = Mul(c, k)", k="1", values="2"), ["Conv"]),
    "offset": (model("c = Conv(x, w) y = Add(c, k)"), ["Conv"]),
    "offset and bias": (model("c = Conv(x, w, b) y = Add(k, c)"), ["Conv"]),
    "factor, then offset": (model("c = Conv(x, w) d = Mul(c, k) y = Add(d, k)"), ["Conv"]),
    "offset, then factor": (model("c = Conv(x, w) d = Add(c, k) y = Mul(d, k)"), ["Conv"]),
    "grouped": (model("c = Conv<group=2>(x, w) y = Mul(c, k)", w="2,1,2,1"), ["Conv"]),
    "ConvTranspose": (model("c = ConvTranspose(x, w) d = Mul(c, k) y = Add(d, k)"), ["ConvTranspose"]),
    "grouped ConvTranspose": (model("c = ConvTranspose<group=2>(x, w) y = Mul(c, k)", w="2,1,2,1"), ["ConvTranspose"]),
    "padding": (model("p = Pad(x, pads) y = Conv(p, w)"), ["Conv"]),
    "padding, with its value": (model("p = Pad(x, pads, zero) y = Conv(p, w)"), ["Conv"]),
    "padding twice": (model("p = Pad(x, pads) q = Pad(p, pads) y = Conv<pads=[1,1,0,0]>(q, w)"), ["Conv"]),
    "padding before VALID": (model('p = Pad(x, pads) y = Conv<auto_pad="VALID">(p, w)'), ["Conv"]),
}

LEAVES_ALONE = {
    "factor along the last axis": (
        model("c = Conv(x, w) y = Mul(c, k)", k="3", values="1,2,3"),
        "what meets Conv is not one number for each of its 2 channels",
    ),
    "factor with more axes": (
        model("c = Conv(x, w) y = Mul(c, k)", k="1,1,2,1,1").replace("float[N,2,A,B] y", "float[1,N,2,A,B] y"),
        "what meets Conv is not one number for each of its 2 channels",
    ),
    "factor is a tensor": (model("c = Conv(x, w) d = Relu(x) y = Mul(c, d)"), "'d' is not a constant"),
    "Conv's result is an output": (
        model("c = Conv(x, w) y = Mul(c, k)", more=", float[N,2,A,B] c"),
        "'c', inside the pattern, is an output of the graph",
    ),
    "Conv's result has a second user": (
        model("c = Conv(x, w) y = Mul(c, k) z = Relu(c)", more=", float[N,2,A,B] z"),
        "'c', inside the pattern, is also used by Relu 'z'",
    ),
    "padding with ones": (
        model("p = Pad(x, pads, zero) y = Conv(p, w)", zero="1"),
        "the padding is 1, Conv pads with 0",
    ),
    "padding of channels": (
        model("p = Pad(x, pads) y = Conv<group=2>(p, w)", w="2,1,2,1", pads="0,1,0,0,0,1,0,0"),
        "the padding [0, 1, 0, 0, 0, 1, 0, 0] is not of spatial axes only",
    ),
    "cropping": (
        model("p = Pad(x, pads) y = Conv(p, w)", pads="0,0,-1,0,0,0,0,0"),
        "the padding [0, 0, -1, 0, 0, 0, 0, 0] cuts off",
    ),
    "reflection": (
        model('p = Pad<mode="reflect">(x, pads) y = Conv(p, w)'),
        "Pad 'p' has mode reflect, PadConv needs constant",
    ),
    "SAME": (model('p = Pad(x, pads) y = Conv<auto_pad="SAME_UPPER">(p, w)'), "Conv has auto_pad SAME_UPPER"),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, fires: Any) -> None:
    fires(FuseConv(), *FIRES[name])


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, leaves_alone: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    leaves_alone(FuseConv(), text, reason)


def test_fires_inside_a_subgraph(parse: Any) -> None:
    graph = parse(
        "(bool k, float[1,2,3,3] x) => (float[1,2,3,3] y) <float[2,2,1,1] w = {1,2,3,4}, float[2,1,1] f = {2,3}> {"
        " y = If (k) <then_branch = g () => (float[1,2,3,3] ty) { c = Conv(x, w) ty = Mul(c, f) },"
        " else_branch = e () => (float[1,2,3,3] fy) { fy = Identity(x) }> }"
    )
    FuseConv().run(graph, Context())
    assert [node.op for node in graph.nodes[0].attrs["then_branch"].nodes] == ["Conv"]
