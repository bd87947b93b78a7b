"""Runs of graphs: what ONNX Runtime is given is what the graph holds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.graph import SMALL, Constant


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4])
@pytest.mark.parametrize("columns", [2, 3])  # an odd number of values ends in half a byte
def test_four_bit_weights_are_read_as_they_are(dtype, columns, parse):
    """Weights beyond SMALL bytes are handed over in memory, where ONNX Runtime wants two values a byte."""
    rows = 2 * SMALL + 1
    levels = np.random.default_rng(0).integers(0, 8, (rows, columns)).astype(dtype)
    levels[:8] = (np.arange(8 * columns) % 16 - (8 if dtype == ml_dtypes.int4 else 0)).reshape(8, columns).astype(dtype)
    name = np.dtype(dtype).name
    graph = parse(
        f"(float[{columns}] x, {name}[{rows},{columns}] w, float s) => (float[{rows},{columns}] y)"
        "{ d = DequantizeLinear(w, s) y = Mul(d, x) }",
        opset=21,
    )
    for tensor, values in zip(list(graph.inputs)[1:], (levels, np.float32(0.5)), strict=True):
        tensor.to_constant(np.asarray(values))
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    found = Session(graph).run({"x": np.ones(columns, np.float32)})["y"]
    assert np.array_equal(found, levels.astype(np.float32) / 2)
