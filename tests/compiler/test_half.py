"""float16 and bfloat16 graphs must run as they would on a GPU: rounded, and overflowing, after every operator."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.graph import Graph, constants


def narrow(graph: Graph, dtype: Any) -> Graph:
    for tensor in (*graph.inputs, *graph.outputs):
        tensor.dtype = np.dtype(dtype)
    for constant in constants(graph):
        constant.values = constant.values.astype(dtype)
    return graph


def test_a_square_that_overflows_is_infinite(parse: Any) -> None:
    text = "(float[2] x) => (float[2] y) <float s = {0.0001}> { q = Mul(x, x) y = Mul(q, s) }"
    x = np.array([300.0, 10.0], np.float16)
    found = Session(narrow(parse(text), np.float16)).run({"x": x})["y"]
    assert np.isinf(found[0])
    assert found[1] == x[1] * x[1] * np.float16(0.0001)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_step_rounds_as_numpy_does(dtype: Any, parse: Any) -> None:
    text = "(float[8] x, float[8] z) => (float[8] y) <float s = {1.1}> { a = Add(x, z) b = Mul(a, s) y = Sub(b, x) }"
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((2, 8)).astype(dtype)
    wide = [v.astype(np.float32) for v in (x, z, np.asarray(1.1, dtype))]
    a = (wide[0] + wide[1]).astype(dtype).astype(np.float32)
    b = (a * wide[2]).astype(dtype).astype(np.float32)
    expected = (b - wide[0]).astype(dtype)
    graph = narrow(parse(text), dtype)
    found = Session(graph).run({"x": x, "z": z})["y"]
    # bfloat16 is given as float32: ONNX Runtime's Python interface has none
    np.testing.assert_array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_is_given_is_rounded_to_what_the_graph_takes(dtype: Any, parse: Any) -> None:
    graph = narrow(parse("(float[3] x) => (float[3] y) { y = Neg(x) }"), dtype)
    x = np.array([1.001, -3.14159, 1e-3], np.float32)
    found = Session(graph).run({"x": x})["y"]
    np.testing.assert_array_equal(found, -x.astype(dtype).astype(found.dtype))
