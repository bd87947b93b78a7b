"""FLOPs against counts made by hand: every number below is written as the product that a person would write."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmc.compiler.report.flops import count_flops
from llmc.passes.graph import Graph

Parse = Callable[..., Graph]

COUNTED = {
    "matmul": ("(float[4,5] a, float[5,6] b) => (float[4,6] y) { y = MatMul(a, b) }", 2 * 4 * 5 * 6),
    "matmul of vectors": ("(float[5] a, float[5] b) => (float y) { y = MatMul(a, b) }", 2 * 5),
    "matmul, one weight for all batches": (
        "(float[2,3,4,5] a, float[5,6] b) => (float[2,3,4,6] y) { y = MatMul(a, b) }",
        2 * (2 * 3) * 4 * 5 * 6,
    ),
    "matmul, batches broadcast": (
        "(float[7,1,4,5] a, float[3,5,6] b) => (float[7,3,4,6] y) { y = MatMul(a, b) }",
        2 * (7 * 3) * 4 * 5 * 6,
    ),
    "matmul, integers": (
        "(uint8[4,5] a, uint8[5,6] b) => (int32[4,6] y) { y = MatMulInteger(a, b) }",
        2 * 4 * 5 * 6,
    ),
    "gemm": ("(float[4,5] a, float[5,6] b, float[6] c) => (float[4,6] y) { y = Gemm(a, b, c) }", 2 * 4 * 5 * 6),
    "gemm, both transposed": (
        "(float[5,4] a, float[6,5] b) => (float[4,6] y) { y = Gemm<transA=1, transB=1>(a, b) }",
        2 * 4 * 5 * 6,
    ),
    "conv": (
        "(float[2,3,8,8] x, float[16,3,3,3] w) => (float[2,16,6,6] y) { y = Conv(x, w) }",
        2 * (2 * 16 * 6 * 6) * (3 * 3 * 3),
    ),
    "conv with stride, dilation and padding: the output is 5 x 5": (
        "(float[1,4,11,11] x, float[8,4,3,3] w) => (float[1,8,5,5] y)"
        "{ y = Conv<strides=[2,2], dilations=[2,2], pads=[1,1,1,1]>(x, w) }",
        2 * (8 * 5 * 5) * (4 * 3 * 3),
    ),
    "conv in groups: each output sees 2 of 8 channels": (
        "(float[1,8,6,6] x, float[12,2,3,3] w) => (float[1,12,4,4] y) { y = Conv<group=4>(x, w) }",
        2 * (12 * 4 * 4) * (2 * 3 * 3),
    ),
    "conv of one dimension, depthwise": (
        "(float[2,6,10] x, float[6,1,5] w) => (float[2,6,6] y) { y = Conv<group=6>(x, w) }",
        2 * (2 * 6 * 6) * 5,
    ),
    "transposed conv: each of 4 x 4 inputs is spread over 3 x 3": (
        "(float[1,5,4,4] x, float[5,7,3,3] w) => (float[1,7,9,9] y) { y = ConvTranspose<strides=[2,2]>(x, w) }",
        2 * (5 * 4 * 4) * (7 * 3 * 3),
    ),
    "transposed conv in groups": (
        "(float[1,6,4,4] x, float[6,2,3,3] w) => (float[1,4,6,6] y) { y = ConvTranspose<group=2>(x, w) }",
        2 * (6 * 4 * 4) * (2 * 3 * 3),
    ),
    "einsum as matmul": (
        '(float[2,4,5] a, float[2,5,6] b) => (float[2,4,6] y) { y = Einsum<equation="bij, bjk -> bik">(a, b) }',
        2 * 2 * 4 * 5 * 6,
    ),
    "einsum with an ellipsis that broadcasts": (
        '(float[7,4,5] a, float[1,5,6] b) => (float[7,4,6] y) { y = Einsum<equation="...ij,...jk->...ik">(a, b) }',
        2 * 7 * 4 * 5 * 6,
    ),
    "einsum without an arrow sums what stands twice": (
        '(float[4,5] a, float[5,6] b) => (float[4,6] y) { y = Einsum<equation="ij,jk">(a, b) }',
        2 * 4 * 5 * 6,
    ),
    "einsum as outer product: nothing is added": (
        '(float[4] a, float[6] b) => (float[4,6] y) { y = Einsum<equation="i,j->ij">(a, b) }',
        4 * 6,
    ),
    "einsum of three operands: two multiplications, one addition": (
        '(float[4,5] a, float[5,6] b, float[6] c) => (float[4] y) { y = Einsum<equation="ij,jk,k->i">(a, b, c) }',
        3 * 4 * 5 * 6,
    ),
    "einsum as transposition": (
        '(float[4,5] a) => (float[5,4] y) { y = Einsum<equation="ij->ji">(a) }',
        0,
    ),
    "lstm, both directions: 4 gates of 8 over 6 inputs and 8 states": (
        "(float[7,2,6] x, float[2,32,6] w, float[2,32,8] r) => (float[7,2,2,8] y)"
        '{ y = LSTM<hidden_size=8, direction="bidirectional">(x, w, r) }',
        2 * 7 * 2 * 2 * (32 * 6 + 32 * 8),
    ),
    "two layers and what lies between them": (
        "(float[4,5] x, float[5,6] a, float[6,7] b) => (float[4,7] y)"
        "{ h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, b) }",
        2 * 4 * 5 * 6 + 2 * 4 * 6 * 7,
    ),
    "no product": ("(float[4] x) => (float[4] y) { y = Relu(x) }", 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_made_by_hand(name: str, parse: Parse) -> None:
    text, expected = COUNTED[name]
    assert count_flops(parse(text), {}) == (expected, 0)


ATTENTION = {
    "four dimensions, 6 heads on 2 key heads, values of another width": (
        "(float[2,6,3,8] q, float[2,2,5,8] k, float[2,2,5,4] v) => (float[2,6,3,4] y) { y = Attention(q, k, v) }",
        2 * (2 * 6) * 3 * 5 * (8 + 4),
    ),
    "three dimensions: 6 heads of 8, values of 4": (
        "(float[2,3,48] q, float[2,5,16] k, float[2,5,8] v) => (float[2,3,24] y)"
        "{ y = Attention<q_num_heads=6, kv_num_heads=2>(q, k, v) }",
        2 * (2 * 6) * 3 * 5 * (8 + 4),
    ),
    "7 keys from the cache": (
        "(float[1,4,1,8] q, float[1,4,1,8] k, float[1,4,1,8] v, float[1,4,7,8] pk, float[1,4,7,8] pv)"
        " => (float[1,4,1,8] y, float[1,4,8,8] nk, float[1,4,8,8] nv) { y, nk, nv = Attention(q, k, v, , pk, pv) }",
        2 * 4 * 1 * (7 + 1) * (8 + 8),
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_two_products(name: str, parse: Parse) -> None:
    text, expected = ATTENTION[name]
    assert count_flops(parse(text, opset=23), {}) == (expected, 0)


def test_symbolic_dimensions_take_the_sizes_given(parse: Parse) -> None:
    graph = parse("(float[batch,seq,5] x, float[5,6] a) => (float[batch,seq,6] y) { h = MatMul(x, a)  y = Relu(h) }")
    assert count_flops(graph, {"batch": 3, "seq": 128}) == (2 * 3 * 128 * 5 * 6, 0)
    assert count_flops(graph, {"batch": 1, "seq": 16}) == (2 * 16 * 5 * 6, 0)


def test_nothing_is_known_without_sizes(parse: Parse) -> None:
    graph = parse("(float[batch,5] x, float[5,6] a) => (float[batch,6] y) { y = MatMul(x, a) }")
    assert count_flops(graph, {}) == (None, 1)


def test_what_is_not_known_is_left_out_and_said(parse: Parse) -> None:
    graph = parse(
        "(float[batch,5] x, float[5,6] a, float[4,6] b) => (float[batch,6] y, float[4,4] z)"
        "{ y = MatMul(x, a)  t = Transpose(b)  z = MatMul(b, t) }"
    )
    assert count_flops(graph, {}) == (2 * 4 * 6 * 4, 1)


def test_shapes_that_the_graph_computes_from_shapes_are_found(parse: Parse) -> None:
    """As torch's legacy exporter writes `x.view(batch, seq * 2, -1)`: ONNX's inference alone finds no shape here."""
    graph = parse(
        """(float[batch,seq,12] x, float[6,9] w) => (float[b,s,9] y) {
            shape = Shape(x)
            zero = Constant<value_int=0>()  one = Constant<value_int=1>()  two = Constant<value_int=2>()
            batch = Gather(shape, zero)  seq = Gather(shape, one)
            twice = Mul(seq, two)
            floor = Div(twice, one)
            axis = Constant<value_ints=[0]>()  rest = Constant<value_ints=[-1]>()
            b1 = Unsqueeze(batch, axis)  s1 = Unsqueeze(floor, axis)
            target = Concat<axis=0>(b1, s1, rest)
            r = Reshape(x, target)
            y = MatMul(r, w)
        }"""
    )
    assert count_flops(graph, {"batch": 3, "seq": 5}) == (2 * 3 * 10 * 6 * 9, 0)


def test_products_in_branches_are_not_counted(parse: Parse) -> None:
    graph = parse(
        """(bool c, float[4,4] x) => (float[4,4] y) {
            h = MatMul(x, x)
            y = If(c) <then_branch = t () => (float[4,4] p) { p = MatMul(x, x) },
                       else_branch = e () => (float[4,4] q) { q = Relu(x) }>
        }"""
    )
    assert count_flops(graph, {}) == (2 * 4 * 4 * 4, 1)


def test_the_graph_is_left_as_it_was(parse: Parse) -> None:
    graph = parse("(float[batch,5] x, float[5,6] a) => (float[batch,6] y) { h = MatMul(x, a)  y = Relu(h) }")
    count_flops(graph, {"batch": 3})
    assert graph.inputs[0].shape == ["batch", 5]
    assert [node.op for node in graph.nodes] == ["MatMul", "Relu"]
    assert graph.nodes[0].outputs[0].shape is None
