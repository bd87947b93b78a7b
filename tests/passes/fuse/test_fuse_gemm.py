from __future__ import annotations

from typing import Any

import pytest

from llmc.passes.base import Context
from llmc.passes.fuse.fuse_gemm import FuseGemm

W = "float[4,2] w = {1,2,3,4,5,6,7,8}"
HEAD = "(float[N,4] x{inputs}) => (float[N,2] y{more}) <{w}, {bias}>"


def model(body: str, bias: str = "float[2] b = {1,-1}", w: str = W, more: str = "", inputs: str = "") -> str:
    return HEAD.format(w=w, bias=bias, more=more, inputs=inputs) + "{" + body + "}"


LINEAR = "m = MatMul(x, w) y = Add(m, b)"

FIRES = {
    "MatMul and Add": (model(LINEAR), ["Gemm"]),
    "bias first": (model("m = MatMul(x, w) y = Add(b, m)"), ["Gemm"]),
    "bias of one row": (model(LINEAR, bias="float[1,2] b = {1,-1}"), ["Gemm"]),
    "bias of one number": (model(LINEAR, bias="float b = {3}"), ["Gemm"]),
    "Gemm and Add": (model("m = Gemm<alpha=0.5>(x, w) y = Add(m, b)"), ["Gemm"]),
    "transposed operand": (
        "(float[4,N] x) => (float[N,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}, float[2] b = {1,-1}>"
        "{ t = Transpose<perm=[1,0]>(x) y = Gemm(t, w, b) }",
        ["Gemm"],
    ),
    "both operands transposed": (
        "(float[4,N] x, float[2,4] w) => (float[N,2] y)"
        "{ t = Transpose(x) u = Transpose<perm=[1,0]>(w) y = Gemm(t, u) }",
        ["Gemm"],
    ),
    "transposed there and in the attribute": (
        "(float[N,4] x, float[4,2] w) => (float[N,2] y){ t = Transpose<perm=[1,0]>(x) y = Gemm<transA=1>(t, w) }",
        ["Gemm"],
    ),
}

LEAVES_ALONE = {
    "three axes": (
        "(float[2,N,4] x) => (float[2,N,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}, float[2] b = {1,-1}>"
        "{ m = MatMul(x, w) y = Add(m, b) }",
        "'x' has 3 axes, Gemm takes 2",
    ),
    "bias widens the product": (
        "(float[1,4] x) => (float[3,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}, float[3,1] b = {1,2,3}>"
        "{ m = MatMul(x, w) y = Add(m, b) }",
        "'b' has shape [3, 1], the product [1, 2]",
    ),
    "bias has more axes": (
        "(float[N,4] x) => (float[1,N,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}, float[1,1,2] b = {1,2}>"
        "{ m = MatMul(x, w) y = Add(m, b) }",
        "'b' has shape [1, 1, 2], the product ['N', 2]",
    ),
    "bias of rows whose number is not known": (
        model(LINEAR, bias="float[3,1] b = {1,2,3}"),
        "'b' has shape [3, 1], the product ['N', 2]",
    ),
    "bias is a tensor": (model("m = MatMul(x, w) y = Add(m, z)", inputs=", float[N,2] z"), "'z' is not a constant"),
    "product is an output": (
        model(LINEAR, more=", float[N,2] m"),
        "'m', inside the pattern, is an output of the graph",
    ),
    "product has a second user": (
        model(LINEAR + " z = Relu(m)", more=", float[N,2] z"),
        "'m', inside the pattern, is also used by Relu 'z'",
    ),
    "bias is there already": (
        model("m = Gemm(x, w, b) y = Add(m, b)"),
        "an optional input is there that must not be, or is missing",
    ),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, fires: Any) -> None:
    fires(FuseGemm(), *FIRES[name])


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, leaves_alone: Any) -> None:
    leaves_alone(FuseGemm(), *LEAVES_ALONE[name])


def test_fires_inside_a_subgraph(parse: Any) -> None:
    graph = parse(
        "(bool c, float[3,4] x) => (float[3,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}, float[2] b = {1,-1}> { y = If (c) "
        "<then_branch = t () => (float[3,2] ty) { m = MatMul(x, w) ty = Add(m, b) },"
        " else_branch = f () => (float[3,2] fy) { fy = MatMul(x, w) }> }"
    )
    FuseGemm().run(graph, Context())
    assert [node.op for node in graph.nodes[0].attrs["then_branch"].nodes] == ["Gemm"]
