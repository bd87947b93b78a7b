from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.decompose.decompose_einsum import DecomposeEinsum
from llmc.passes.graph import Graph, copy_graph, from_model

FIRES = {
    "bqhd,bkhd->bhqk": ([(2, 3, 4, 5), (2, 6, 4, 5)], ["Transpose", "Transpose", "MatMul"]),
    "bhqk,bkhd->bqhd": ([(2, 4, 3, 6), (2, 6, 4, 5)], ["Transpose", "MatMul", "Transpose"]),
    "aecd,abcd->acbe": ([(2, 3, 4, 5), (2, 6, 4, 5)], ["Transpose", "Transpose", "MatMul", "Transpose"]),
    "acbe,aecd->abcd": ([(2, 3, 4, 5), (2, 5, 3, 6)], ["Transpose", "MatMul", "Transpose"]),
    "bhij, bhjk -> bihk": ([(2, 3, 4, 5), (2, 3, 5, 6)], ["MatMul", "Transpose"]),
    "bsd,de->bse": ([(2, 3, 4), (4, 5)], ["MatMul"]),
    "ij,jk": ([(2, 3), (3, 4)], ["MatMul"]),
    "ba,bc->ca": ([(2, 3), (2, 4)], ["Transpose", "MatMul", "Transpose"]),
    "...ij,jk->...ik": ([(2, 3, 4, 5), (5, 6)], ["MatMul"]),
    "bij,bj->bi": ([(2, 3, 4), (2, 4)], ["Reshape", "MatMul", "Reshape"]),
    "bj,bij->bi": ([(2, 4), (2, 3, 4)], ["Reshape", "Transpose", "MatMul", "Reshape"]),
    "a...b,b->...a": ([(2, 3, 4), (4,)], ["Transpose", "Reshape", "MatMul", "Reshape"]),
    "i,i->": ([(4,), (4,)], ["Mul", "ReduceSum"]),
    "bi,bi->b": ([(2, 4), (2, 4)], ["Mul", "ReduceSum"]),
    "ijk,ilk->": ([(2, 3, 4), (2, 5, 4)], ["ReduceSum", "ReduceSum", "Mul", "ReduceSum"]),
    "abx,acy->abc": (
        [(2, 3, 4), (2, 5, 6)],
        ["ReduceSum", "ReduceSum", "Unsqueeze", "Unsqueeze", "Mul"],
    ),
    "i,j->ji": ([(3,), (4,)], ["Unsqueeze", "Unsqueeze", "Mul"]),
    "...,...->...": ([(2, 3), (3,)], ["Unsqueeze", "Mul"]),
    "abc->ca": ([(2, 3, 4)], ["ReduceSum", "Transpose"]),
    "...ij->...ji": ([(2, 3, 4)], ["Transpose"]),
    "ab->": ([(2, 3)], ["ReduceSum"]),
    "ab->ab": ([(2, 3)], ["Identity"]),
}
"""Equation → operands, and the operators it is written with, whether sizes are known or not."""

FIRES_WITH_SIZES = {
    "abc,cde->abde": ([(2, 3, 4), (4, 5, 6)], ["Reshape", "MatMul", "Reshape"]),
    "abcd,cde->abe": ([(2, 3, 4, 5), (4, 5, 6)], ["Reshape", "Reshape", "MatMul"]),
    "bijc,bcd->bijd": ([(2, 3, 4, 5), (2, 5, 6)], ["Reshape", "MatMul", "Reshape"]),
    "...ij,...jk->...ik": (
        [(2, 1, 4, 5), (3, 5, 6)],
        ["Transpose", "Reshape", "MatMul", "Reshape", "Transpose"],
    ),
}
"""The same, where axes are merged whose sizes must be known."""

LEAVES_ALONE = {
    "ii->i": ([(3, 3)], "'ii' in 'ii->i' takes a diagonal"),
    "ij,jk,kl->il": (
        [(2, 3), (3, 4), (4, 5)],
        "'ij,jk,kl->il' has 3 operands, one or two are written anew",
    ),
}


def einsum(equation: str, shapes: list[tuple[int, ...]], symbolic: bool) -> Graph:
    inputs = [
        onnx.helper.make_tensor_value_info(
            f"x{i}", onnx.TensorProto.FLOAT, [f"s{i}{axis}" for axis in range(len(shape))] if symbolic else shape
        )
        for i, shape in enumerate(shapes)
    ]
    node = onnx.helper.make_node("Einsum", [i.name for i in inputs], ["y"], equation=equation)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    proto = onnx.helper.make_graph([node], "g", inputs, [output])
    return from_model(onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=10))


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("equation", [*FIRES, *FIRES_WITH_SIZES])
def test_fires(equation: str, symbolic: bool) -> None:
    shapes, operators = {**FIRES, **FIRES_WITH_SIZES}[equation]
    graph = einsum(equation, shapes, symbolic)
    result = DecomposeEinsum().run(graph, Context())
    if symbolic and equation in FIRES_WITH_SIZES:
        assert [m.reason for m in result.near_misses] == [f"'{equation}' merges axes whose sizes are not known"]
        return
    assert [node.op for node in graph.nodes] == operators
    rng = np.random.default_rng(0)
    feeds = {f"x{i}": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}
    expected = np.einsum(equation, *(feeds[name].astype(np.float64) for name in sorted(feeds)))
    found = Session(graph).run(feeds)["y"]
    assert found.shape == expected.shape
    # float32: sums of at most 40 products of order 1, 2^-24 each
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("equation", LEAVES_ALONE)
def test_leaves_alone(equation: str) -> None:
    shapes, reason = LEAVES_ALONE[equation]
    graph = einsum(equation, shapes, symbolic=False)
    result = DecomposeEinsum().run(graph, Context())
    assert [node.op for node in graph.nodes] == ["Einsum"]
    assert [miss.reason for miss in result.near_misses] == [reason]


def test_sizes_that_disagree_are_left_to_the_runtime(parse: Any) -> None:
    graph = parse('(float[A,B] x, float[C,D] z) => (float[A,D] y) { y = Einsum<equation="ij,jk->ik">(x, z) }')
    wrong = copy_graph(graph)
    wrong.inputs[0].shape, wrong.inputs[1].shape = [2, 3], [1, 4]
    result = DecomposeEinsum().run(wrong, Context())
    assert [miss.reason for miss in result.near_misses] == ["'j' in 'ij,jk->ik' is 3 and 1"]


def test_fires_inside_a_subgraph(parse: Any) -> None:
    graph = parse(
        "(bool c, float[2,4] x) => (float[4,2] y) { y = If (c) "
        '<then_branch = t () => (float[4,2] ty) { a = Abs(x) ty = Einsum<equation="ij->ji">(a) },'
        " else_branch = f () => (float[4,2] fy) { fy = Transpose(x) }> }"
    )
    DecomposeEinsum().run(graph, Context())
    assert [node.op for node in graph.nodes[0].attrs["then_branch"].nodes] == ["Abs", "Transpose"]
