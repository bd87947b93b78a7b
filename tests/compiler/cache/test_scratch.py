from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from llmc.compiler.cache.scratch import Scratch
from llmc.compiler.errors import LlmcError
from llmc.compiler.spill import spilling_to
from llmc.passes.graph import Weights


def test_tensors_are_mapped_from_a_file_without_a_name(tmp_path: Path) -> None:
    given = [np.random.default_rng(i).standard_normal(n).astype(np.float32) for i, n in enumerate((5000, 3, 70000))]
    with spilling_to(tmp_path / "not" / "there" / "yet"):
        scratch = Scratch()
        held = [Weights(onnx.TensorProto.FLOAT, a.shape, scratch.add(a.view(np.uint8).data)) for a in given]
    assert list(tmp_path.iterdir()) == []
    for weights, values in zip(held, given, strict=True):
        found = weights.load()
        np.testing.assert_array_equal(found, values)
        assert isinstance(found.base, np.memmap)
        assert not found.flags.writeable


def test_the_file_is_there_as_long_as_a_tensor_is(tmp_path: Path) -> None:
    scratch = Scratch()
    values = np.arange(3000, dtype=np.int64)
    held = Weights(onnx.TensorProto.INT64, values.shape, scratch.add(values.view(np.uint8).data))
    del scratch
    gc.collect()
    with (tmp_path / "another").open("wb") as other:  # which gets the lowest descriptor that is free
        other.write(bytes(values.nbytes))
        other.flush()
        np.testing.assert_array_equal(held.load(), values)


def test_a_full_disk_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch()
    with Path("/dev/full").open("r+b", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
        with (
            spilling_to(tmp_path),
            pytest.raises(LlmcError, match=rf"weights cannot be written in {tmp_path}: No space left on device"),
        ):
            scratch.add(memoryview(bytes(10)))
