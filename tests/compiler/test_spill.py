"""Values that wait on disk come back as they were, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from llmc.compiler.errors import LlmcError
from llmc.compiler.spill import SPILLED_FROM, Spill, spilling_to
from llmc.passes.graph import Array, Elementwise

TYPES = st.sampled_from([np.float32, np.float16, np.int64, np.int8, np.bool_])


@given(st.lists(arrays(TYPES, array_shapes(min_dims=0, max_dims=3, min_side=0)), max_size=5), st.integers(0, 5))
@settings(deadline=None)
def test_come_back_in_turn(small: list[Array], position: int) -> None:
    large = np.arange(SPILLED_FROM, dtype=np.float64).reshape(2, -1).T  # transposed: not in order in memory
    given_values = [*small[:position], large, *small[position:], large[::2]]
    spill = Spill()
    assert [spill.put(value) for value in given_values] == list(range(len(given_values)))
    for one, other in zip(spill.values(), given_values, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_the_file_has_no_name(tmp_path: Path) -> None:
    """Nothing is left of it, however the process ends."""
    with spilling_to(tmp_path):
        spill = Spill()
        spill.put(np.zeros(SPILLED_FROM, np.int8))
        assert not list(tmp_path.iterdir())
        (value,) = spill.values()
    assert isinstance(value.base, np.memmap)
    assert value.sum() == 0
    assert not list(tmp_path.iterdir())


def test_a_weight_is_computed_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.passes.graph.tensors.COMPUTED", 1 << 12)
    source = np.random.default_rng(0).standard_normal((64, 100), np.float32)
    rows = []

    def narrow(block: Array) -> Array:
        rows.append(len(block))
        return block.astype(ml_dtypes.bfloat16)

    spill = Spill()
    numbers = [spill.put(source), spill.put_weight(Elementwise(onnx.TensorProto.BFLOAT16, source.T, narrow))]
    found = spill.values()
    whole, narrowed = (found[number] for number in numbers)
    assert sum(rows) == 100
    assert max(rows) < 100
    assert isinstance(narrowed.base, np.memmap)
    np.testing.assert_array_equal(whole, source)
    np.testing.assert_array_equal(narrowed, source.T.astype(ml_dtypes.bfloat16))


def test_a_full_disk_is_an_error_of_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("r+b", buffering=0) as full:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full)
        with pytest.raises(LlmcError, match=r"values cannot be written in .*: No space left on device"):
            Spill().put(np.zeros(SPILLED_FROM, np.int8))
