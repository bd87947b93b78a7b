from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.passes.graph import Array
from llmc.passes.precision.rounding import parts
from llmc.passes.precision.rounding.grid import Levels, Rounded, cover, nearest
from llmc.passes.precision.rounding.hqq import fitted, hqq
from llmc.passes.precision.rounding.parts import round_in_parts

SHAPES = (((64, 6), 0), ((6, 64), 1), ((3, 32, 5), 1), ((2, 5, 64), 2), ((1, 96), 1), ((32, 1), 0))
"""Shape of a weight, and the axis that is summed."""


@pytest.mark.parametrize(("fit", "whole"), [(cover, nearest), (fitted, hqq)])
@given(
    place=st.sampled_from(SHAPES),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    block=st.sampled_from([16, 32, None]),
    part=st.integers(1, 200),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_what_rounding_the_whole_gives(
    fit: parts.Fit,
    whole: Callable[[Array, Levels], Rounded],
    place: tuple[tuple[int, ...], int],
    bits: int,
    symmetric: bool,
    block: int | None,
    part: int,
    half: bool,
    seed: int,
) -> None:
    shape, axis = place
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float16 if half else np.float32)
    levels = Levels(bits, block or shape[axis], symmetric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART", part)
        found = round_in_parts(weight, axis, levels, fit)

    matrix = np.moveaxis(weight, axis, -1).reshape(-1, shape[axis]).astype(np.float32)
    expected = whole(matrix, levels)

    def rows(values: Array) -> Array:
        return np.moveaxis(values, axis, -1).reshape(len(matrix), -1)

    np.testing.assert_array_equal(rows(found.integers), expected.integers.astype(np.int16))
    np.testing.assert_array_equal(rows(found.scale), expected.grid.scale)
    np.testing.assert_array_equal(rows(found.zero), expected.grid.zero)
    assert found.clipped == expected.grid.clipped(matrix)
    moved = expected.matrix() - matrix
    # float32 sums of 400 squares at most: 400 roundings of 2^-24.
    assert found.error == pytest.approx(np.linalg.norm(moved) / np.linalg.norm(matrix), rel=1e-4)


def test_no_copy_of_the_whole_in_float32_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given back has a byte a value, and the scales; a thread has some copies of a part beside it."""
    monkeypatch.setattr(parts, "PART", 1 << 14)
    weight = np.random.default_rng(0).standard_normal((2048, 1024), dtype=np.float32).astype(np.float16)
    tracemalloc.start()
    round_in_parts(weight, 0, Levels(4, 32), cover)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < weight.size * (1 + 2 * 4 / 32) + 1.5 * weight.size, "a copy in float32 has four bytes a value"


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(strange: float) -> None:
    weight = np.ones((64, 64), np.float32)
    weight[40, 3] = strange
    with pytest.raises(ValueError, match="NaN or infinity"):
        round_in_parts(weight, 0, Levels(4, 32), cover)
