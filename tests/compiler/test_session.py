"""Runs of graphs: what ONNX Runtime is given is what the graph holds."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.graph import SMALL, Constant, FileRegion, Weights


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


def test_tensors_inside_a_graph_that_are_bfloat16_come_as_float32(parse):
    text = "(bfloat16[3] x) => (bfloat16[3] y) { a = Neg(x) i = Identity(a) n = Cast<to=1>(i) s = Exp(n) y = Abs(a) }"
    x = np.array([1, 2.5, -3], ml_dtypes.bfloat16)
    found = Session(parse(text), ("a", "i", "s", "y")).run({"x": x})
    for name in ("a", "i"):
        np.testing.assert_array_equal(found[name], -x.astype(np.float32), strict=True)
    np.testing.assert_allclose(found["s"], np.exp(-x.astype(np.float32)), rtol=1e-6)  # float32's own rounding
    np.testing.assert_array_equal(found["y"], np.abs(x.astype(np.float32)), strict=True)


def anonymous_bytes() -> int:
    """Of this process's memory, what no file stands behind (proc(5), RssAnon)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_of_a_mapped_file_are_not_copied(parse, tmp_path):
    depth, width = 1 << 14, 1 << 10
    size = 4 * depth * width
    np.zeros(1, np.float32).tofile(tmp_path / "weights")
    with (tmp_path / "weights").open("r+b") as file:
        file.truncate(size)
    graph = parse(
        f"(float[N,{depth}] x, float[{depth},{width}] w) => (float[N,{width}] y) {{ y = MatMul(x, w) }}", opset=21
    )
    graph.inputs.pop().to_constant(Weights(1, (depth, width), FileRegion(tmp_path / "weights", 0)))
    before = anonymous_bytes()
    session = Session(graph)
    session.run({"x": np.ones((2, depth), np.float32)})
    # A copy would be 64 MB; the session itself, its arena and the buffers of the product take a few.
    assert anonymous_bytes() - before < size / 4
