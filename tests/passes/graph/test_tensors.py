"""Large weights block by block: the same values, and no more of them in memory than a block."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings

from llmc.passes.graph import (
    Array,
    Constant,
    Elementwise,
    Graph,
    Node,
    Variable,
    Weights,
    beginning,
    blocks_of,
    raw_blocks,
    raw_values,
    save_model,
    tensors,
)

FLOAT16 = onnx.TensorProto.FLOAT16


def halved(values: Array) -> Array:
    return values.astype(np.float16)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    block=st.integers(1, 200),
    transposed=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.int4]),
)
def test_blocks_are_the_whole(shape: tuple[int, ...], block: int, transposed: bool, dtype: Any) -> None:
    whole = np.arange(np.prod(shape)).astype(np.int8).astype(dtype).reshape(shape)
    values = whole.T if transposed else whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "BLOCK", block)
        patch.setattr(tensors, "COMPUTED", block)
        onnx_dtype = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        assert b"".join(raw_blocks(values, onnx_dtype)) == bytes(raw_values(values, onnx_dtype))
        assert all(len(part) == 1 or part.nbytes <= block for part in blocks_of(values) if part.ndim and part.size)
        made = Elementwise(FLOAT16, values, halved)
        again = Elementwise(onnx.TensorProto.DOUBLE, made, lambda part: part.astype(np.float64))
        assert (made.shape, made.dtype, made.nbytes) == (values.shape, np.float16, 2 * values.size)
        np.testing.assert_array_equal(made.load(), values.astype(np.float16), strict=True)
        np.testing.assert_array_equal(again.load(), values.astype(np.float16).astype(np.float64), strict=True)


def test_no_more_of_a_weight_is_made_than_a_block(tmp_path: Path) -> None:
    """Sizes as in test_onnx_file.py: 16 MB that are cast, from a file and transposed, with blocks of 64 KB."""
    source = (np.arange(1 << 22, dtype=np.float32) % 2048).reshape(1 << 12, 1 << 10)
    source.tofile(tmp_path / "w")
    region = tensors.FileRegion(tmp_path / "w", 0)
    held = Weights(onnx.TensorProto.FLOAT, source.shape, region)
    for given_weight, expected in ((held, source), (held.load().T, source.T)):
        made = Elementwise(FLOAT16, given_weight, halved)
        output = Variable("y", np.float16, made.shape)
        graph = Graph(nodes=[Node("Identity", "n", inputs=[Constant("w", made)], outputs=[output])], outputs=[output])
        graph.opset, graph.ir_version = 21, 10
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensors, "COMPUTED", 1 << 16)
            tracemalloc.start()
            try:
                save_model(graph, tmp_path / "m.onnx", inline_below=1024)
                assert made.beginning == beginning(expected[:1].astype(np.float16))
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert peak < 1 << 20  # of NumPy and Python
        assert (tmp_path / "m.onnx.data").read_bytes() == expected.astype(np.float16).tobytes()
