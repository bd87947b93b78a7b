"""NVFP4 and MXFP8 numbers, against the formats as ml_dtypes has them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from llmc.passes.graph import Array
from llmc.passes.precision.block_formats import MXFP8, NVFP4, BlockFormat, tensor_scale

FORMATS = [NVFP4, MXFP8]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""The magnitudes of 4-bit floats, from the specification."""


def half_step(values: Array, form: BlockFormat) -> Array:
    """Half the distance of the format's numbers around each of `values`, which are in units of a scale."""
    if form is NVFP4:
        return np.where(values < 2, 0.25, np.where(values < 4, 0.5, 1.0))
    return np.maximum(2.0**-4 * values, 2.0**-10)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_values_go_to_the_nearest_element_and_scales_are_numbers_of_their_format(
    form: BlockFormat, data: st.DataObject
) -> None:
    exponents = data.draw(npst.arrays(np.int8, (3, 2, 1), elements=st.integers(-10, 10)))
    values = data.draw(npst.arrays(np.float32, (3, 2, form.block), elements=st.floats(-1, 1, width=32)))
    matrix = (values * np.exp2(exponents.astype(np.float32))).reshape(3, -1)
    rounded = form.round(matrix)
    assert rounded.elements.dtype == form.numpy
    assert rounded.stored.dtype == form.numpy_scale
    scale = rounded.stored.astype(np.float64)[..., None] * rounded.whole
    assert (scale > 0).all()
    exact = np.abs(matrix.reshape(3, 2, -1) / scale)
    found = np.abs(rounded.elements.astype(np.float64))
    within = exact <= form.largest
    assert (np.abs(found - exact) <= half_step(exact, form))[within].all()
    assert (found[~within] == form.largest).all()
    # Dequantized in float16 or bfloat16 nothing moves, but for what they have no normal numbers for.
    whole = rounded.elements.astype(np.float64) * scale
    normal = np.abs(whole) >= 2.0**-126
    np.testing.assert_array_equal(whole.astype(ml_dtypes.bfloat16).astype(np.float64)[normal], whole[normal])
    if form is NVFP4:
        fits = (np.abs(whole) >= 2.0**-14) & (np.abs(whole) <= 65504)
        np.testing.assert_array_equal(whole.astype(np.float16).astype(np.float64)[fits], whole[fits])
    np.testing.assert_array_equal(rounded.matrix(), whole.reshape(3, -1).astype(np.float32))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@settings(deadline=None, max_examples=50)
@given(values=npst.arrays(np.float32, (4, 64), elements=st.floats(-1e4, 1e4, width=32)))
def test_the_error_is_within_half_the_widest_step_of_the_block(form: BlockFormat, values: Array) -> None:
    """MXFP8's scales reach the largest value; NVFP4's are those of least error, so no worse than one that does."""
    moved = np.abs(form.round(values).matrix() - values).reshape(4, -1, form.block)
    amax = np.abs(values).reshape(moved.shape).max(axis=-1)
    if form is MXFP8:
        least = 2.0**-127 * 2.0**-10  # half of the least number, at the least scale
        assert (moved.max(axis=-1) <= np.maximum(amax.astype(np.float64) * 2.0**-4, least)).all()
        return
    whole = tensor_scale(float(np.abs(values).max()), 4.0)
    # Up to the scale next above amax / 6: 2^-3 more at most, or the least there is.
    step = np.maximum(amax / 6 * (1 + 2.0**-3), 2.0**-9 * whole)
    assert (np.sqrt(np.square(moved).sum(axis=-1)) <= step * np.sqrt(form.block)).all()


def test_blocks_of_zeros_stay_zeros() -> None:
    for form in FORMATS:
        assert not form.round(np.zeros((2, 64), np.float32)).matrix().any()


def test_a_search_finds_scales_that_err_less_than_those_that_reach_the_largest() -> None:
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    blocks = values.reshape(64, -1, 16)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 6
    levels = np.concatenate([-E2M1[::-1], E2M1])
    nearest = levels[np.abs((blocks / scale)[..., None] - levels).argmin(-1)] * scale
    plain = np.square(nearest - blocks).sum()
    assert np.square(NVFP4.round(values).matrix() - values).sum() < 0.9 * plain


@given(amax=st.floats(2.0**-6, 2.0**20))
def test_the_scale_of_a_tensor_lets_e4m3_reach_its_largest_block(amax: float) -> None:
    scale = tensor_scale(amax)
    assert np.log2(scale).is_integer()
    assert 224 <= amax / 6 / scale <= 448 or scale == 2.0**-15


def test_weights_in_nvfp4_move_by_5_17_of_the_largest_of_their_block_at_most() -> None:
    """1 - 6 / 8.5: a block's largest value is let stand at 8 at most, and E4M3 moves the scale by 1/17 at most."""
    rng = np.random.default_rng(0)
    steps = rng.choice([0.75, 1.75, 2.5, 3.5, 5, 6], (4000, 16)) * rng.uniform(0.9, 1.1, (4000, 16))
    steps[:, 0] = rng.uniform(6, 9, 4000)
    matrix = (steps * np.exp(rng.uniform(-3, 0, (4000, 1)))).astype(np.float32)
    rounded = NVFP4.round(matrix)
    moved = (np.abs(rounded.matrix() - matrix).max(axis=1) / matrix.max(axis=1)).max()
    assert 1 / 6 < moved <= 5 / 17


@settings(deadline=None, max_examples=50)
@given(npst.arrays(np.float32, (8, 16), elements=st.floats(2.0**-12, 1, width=32)))
def test_activations_in_nvfp4_move_by_3_17_of_the_largest_of_their_block_at_most(values: Array) -> None:
    """A value of 5, half way between two numbers, in a block whose largest stands at 17/3: E4M3 moved its scale up."""
    amax = values.max(axis=1, keepdims=True)
    whole = tensor_scale(float(values.max()))
    scale = (
        np.clip(amax / np.float32(6 * whole), 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole
    )
    moved = np.abs(NVFP4.elements(values[:, None], scale)[:, 0].astype(np.float32) * scale - values)
    assert (moved <= amax * (3 / 17 + 1e-6)).all()  # 1e-6: quotients in float32


def test_a_value_is_clipped_that_moves_further_than_rounding_takes_any() -> None:
    matrix = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32) ** 3
    assert MXFP8.round(matrix).clipped(matrix) == 0, "its scales reach the largest value"
    rounded = NVFP4.round(matrix)
    scale = np.repeat(rounded.stored.astype(np.float64) * rounded.whole, 16, axis=1)
    beyond = np.abs(rounded.matrix() - matrix) > scale  # between 4 and 6 rounding moves a value by a scale at most
    assert rounded.clipped(matrix) == np.count_nonzero(beyond) / matrix.size > 0
