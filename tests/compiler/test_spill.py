"""Values that wait on disk come back as they were, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from llmc.compiler.spill import SPILLED_FROM, Spill, spilling_to
from llmc.passes.graph import Array

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
