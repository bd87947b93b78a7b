"""Products of 8 bits are sums of whole numbers: exact on any processor, by NumPy's int64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.integers import has_signed_products, with_unsigned_products
from llmc.compiler.session import Session
from llmc.passes.graph import Array, Graph, onnx_dtype

EXTREME = np.random.default_rng(0).integers(-128, -100, (64, 8)).astype(np.int8)
"""With activations near 255, any two products leave 16 bits."""
LOUD = np.random.default_rng(1).integers(200, 256, (5, 64)).astype(np.uint8)


def weighted(graph: Graph, **constants: Array) -> Graph:
    for name, values in constants.items():
        next(tensor for tensor in graph.inputs if tensor.name == name).to_constant(values)
    graph.inputs = [tensor for tensor in graph.inputs if tensor.name not in constants]
    return graph


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("zero", [np.int8(-3), np.arange(8, dtype=np.int8)])
def test_a_product_with_zero_points(parse: Any, zero: Any, known: bool) -> None:
    zero = np.asarray(zero)
    z = f"int8[{zero.size}] z" if zero.ndim else "int8 z"
    graph = parse(
        f"(uint8[N,64] x, int8[64,8] w, uint8 xz, {z}) => (int32[N,8] y) {{ y = MatMulInteger(x, w, xz, z) }}"
    )
    constants = {"w": EXTREME, "z": zero, "xz": np.array(7, np.uint8)}
    feeds = {"x": LOUD} if known else {"x": LOUD, **constants}
    found = Session(weighted(graph, **constants) if known else graph).run(feeds)["y"]
    np.testing.assert_array_equal(found, (LOUD.astype(np.int64) - 7) @ (EXTREME.astype(np.int64) - zero))


def test_two_signed_factors_without_zero_points(parse: Any) -> None:
    graph = parse("(int8[N,64] x, int8[64,8] w) => (int32[N,8] y) { y = MatMulInteger(x, w) }")
    x = (LOUD.astype(np.int16) - 328).clip(-128).astype(np.int8)
    found = Session(weighted(graph, w=EXTREME)).run({"x": x})["y"]
    np.testing.assert_array_equal(found, x.astype(np.int64) @ EXTREME.astype(np.int64))


def test_a_quantized_convolution(parse: Any) -> None:
    """A scale of the result so large that the sums need no rounding beyond its own."""
    text = """(uint8[1,64,1,5] x, float xs, uint8 xz, int8[8,64,1,1] w, float ws, int8 wz, float ys, uint8 yz)
        => (uint8[1,8,1,5] y) { y = QLinearConv(x, xs, xz, w, ws, wz, ys, yz) }"""
    weight = np.ascontiguousarray(EXTREME.T).reshape(8, 64, 1, 1)
    one, scale = np.array(1, np.float32), np.array(8192, np.float32)
    zero = {"xz": np.array(0, np.uint8), "wz": np.array(0, np.int8), "yz": np.array(255, np.uint8)}
    graph = weighted(parse(text), w=weight, xs=one, ws=one, ys=scale, **zero)
    x = LOUD.T.reshape(1, 64, 1, 5)
    sums = EXTREME.T.astype(np.int64) @ x.reshape(64, 5)
    expected = np.clip(np.rint(sums / 8192) + 255, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(Session(graph).run({"x": x})["y"].reshape(8, 5), expected)


@pytest.mark.parametrize(
    "text",
    [
        "(uint8[N,64] x, uint8[64,8] w) => (int32[N,8] y) { y = MatMulInteger(x, w) }",
        "(int8[N,64] x, float s, int8 z, int8[64,8] w) => (int8[N,8] y) { y = QLinearMatMul(x, s, z, w, s, z, s, z) }",
        "(float[N,64] x, float[64,8] w) => (float[N,8] y) { y = MatMul(x, w) }",
    ],
)
def test_others_stay_as_they_are(parse: Any, text: str) -> None:
    assert not has_signed_products(parse(text))


def test_the_graph_that_is_given_stays_as_it_is(parse: Any) -> None:
    graph = parse("(uint8[N,64] x, int8[64,8] w) => (int32[N,8] y) { y = MatMulInteger(x, w) }")
    made = with_unsigned_products(weighted(graph, w=EXTREME))
    assert has_signed_products(graph)
    assert not has_signed_products(made)
    assert [onnx_dtype(tensor) for tensor in graph.inputs] == [onnx_dtype(tensor) for tensor in made.inputs]
