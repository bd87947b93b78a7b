"""Rounding on its own: grids, and each way to choose levels on them, against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from llmc.passes.graph import Array
from llmc.passes.precision.rounding import awq
from llmc.passes.precision.rounding.gptq import Debts, gptq
from llmc.passes.precision.rounding.grid import Levels, Rounded, cover, fit, nearest, positive
from llmc.passes.precision.rounding.hqq import NORM, hqq
from llmc.passes.precision.rounding.moments import Moments, Source, batches
from llmc.passes.precision.scales import FINE

BITS = st.sampled_from([4, 8])
MATRICES = npst.arrays(np.float32, (3, 32), elements=st.floats(-1000, 1000, width=32))


def outliers(rows: int = 24, depth: int = 64, samples: int = 512, seed: int = 0) -> tuple[Array, Array]:
    """A matrix, and correlated activations [samples, depth] of which a few channels are large."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((samples, depth)) @ (np.eye(depth) + 0.3 * rng.standard_normal((depth, depth)))
    mixed[:, :4] *= 20
    return rng.standard_normal((rows, depth)).astype(np.float32), mixed.astype(np.float32)


def moments(activations: Array) -> Moments:
    made = Moments(activations.shape[1])
    made.add(activations)
    return made


def output_error(matrix: Array, rounded: Array, activations: Array) -> float:
    """Measured on the activations themselves, not on their moments."""
    return float(np.square(activations.astype(np.float64) @ (rounded - matrix).T).mean())


@settings(deadline=None)
@given(MATRICES, BITS, st.sampled_from([8, 16, 32]), st.booleans())
def test_rounding_to_nearest_moves_no_value_by_more_than_half_a_scale(matrix, bits, block, symmetric):
    rounded = nearest(matrix, Levels(bits, block, symmetric))
    scale = np.repeat(rounded.grid.scale, block, axis=1)
    # Relative 2^-22: the division and the product each round in float32. An asymmetric zero point is rounded, which
    # may push one end of the range half a step out: there a whole step is the bound.
    limit = (0.5 if symmetric else 1.0) * scale + np.abs(matrix) * 2.0**-22
    assert (np.abs(rounded.matrix() - matrix) <= limit).all()
    assert rounded.integers.dtype == Levels(bits, block, symmetric).dtype


@settings(deadline=None)
@given(MATRICES, BITS, st.booleans())
def test_zero_stays_zero(matrix, bits, symmetric):
    matrix[:, ::3] = 0
    for rounded in (nearest(matrix, Levels(bits, 16, symmetric)), hqq(matrix, Levels(bits, 16, symmetric))):
        assert not rounded.matrix()[:, ::3].any()


@settings(deadline=None)
@given(st.floats(2.0**-30, 60000, width=32))
def test_scales_are_float16_values_no_smaller_than_asked_for(scale):
    found = positive(np.array([scale], np.float32))
    assert found.dtype == np.float32
    assert scale <= found[0] <= scale * (1 + 2.0**-7)
    if scale >= FINE:
        assert found[0] == found[0].astype(np.float16)


@settings(deadline=None)
@given(MATRICES, BITS, st.sampled_from([8, 32]), st.booleans(), st.floats(0.125, 1000, width=32))
def test_gptq_with_activations_that_are_independent_rounds_to_nearest(matrix, bits, block, symmetric, size):
    """H = size · I: no value can make up for another. Exactly: each off-diagonal product is 0."""
    levels = Levels(bits, block, symmetric)
    grid = cover(matrix, levels)
    found = gptq(matrix, grid, Debts.of(size * np.eye(32, dtype=np.float32)))
    assert np.array_equal(found.integers, nearest(matrix, levels, grid).integers)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_calibrated_step_lowers_the_error_of_the_output(block, symmetric):
    matrix, activations = outliers()
    levels, known = Levels(4, block, symmetric), moments(activations)
    plain = nearest(matrix, levels)
    clipped = awq.clip(matrix, levels, known.hessian)
    together = awq.clip_together(matrix, levels, known.hessian)
    scales = awq.channel_scales([matrix], levels, known)
    scaled = nearest(matrix * scales, levels, awq.clip_together(matrix * scales, levels, known.divided(scales).hessian))
    errors = {
        "rtn": output_error(matrix, plain.matrix(), activations),
        "clip": output_error(matrix, nearest(matrix, levels, clipped).matrix(), activations),
        "together": output_error(matrix, nearest(matrix, levels, together).matrix(), activations),
        "awq": output_error(matrix, scaled.matrix() / scales, activations),
        "gptq": output_error(matrix, gptq(matrix, clipped, Debts.of(known.hessian)).matrix(), activations),
    }
    assert errors["rtn"] > errors["clip"] >= errors["together"] > errors["awq"], errors
    assert (errors["clip"] > errors["together"]) == (block < 64), "one block has no others to regard"
    assert errors["clip"] > 2 * errors["gptq"], errors


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([8, 16, 32]), st.booleans())
def test_blocks_clipped_together_move_no_row_s_output_further_than_each_by_itself(seed, block, symmetric):
    matrix, activations = outliers(rows=4, depth=32, samples=64, seed=seed)
    levels, hessian = Levels(4, block, symmetric), moments(activations).hessian
    alone, together = (
        nearest(matrix, levels, clip(matrix, levels, hessian)).matrix() - matrix
        for clip in (awq.clip, awq.clip_together)
    )
    errors = [np.square(activations.astype(np.float64) @ moved.T).sum(axis=0) for moved in (alone, together)]
    # 1e-4: what is compared in float32, of sums over 32 channels that largely cancel out.
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all()


def test_gptq_is_what_its_definition_gives():
    """One value after another, in order of their weight, the rest solved for anew each time by least squares."""
    matrix, activations = outliers(rows=3, depth=12, samples=64)
    levels, hessian = Levels(4, 4), moments(activations).hessian.astype(np.float64)
    grid = cover(matrix, levels)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(12)
    expected = np.empty((3, 12))
    for row in range(3):
        left, values = list(np.argsort(-np.diag(hessian), kind="stable")), matrix[row].astype(np.float64)
        while left:
            first, rest = left[0], left[1:]
            scale = float(grid.scale[row, first // 4])
            level = np.clip(np.rint(values[first] / scale), -8, 7)
            expected[row, first] = level
            values[rest] += np.linalg.solve(
                damped[np.ix_(rest, rest)], damped[rest, first] * (values[first] - level * scale)
            )
            left = rest
    assert np.array_equal(gptq(matrix, grid, Debts.of(hessian)).integers.astype(np.float64), expected)


def test_strides_change_nothing(monkeypatch):
    """Up to rounding in float32, which decides where a value lies between two levels: all but a few agree."""
    matrix, activations = outliers(depth=64)
    levels, hessian = Levels(4, 16), moments(activations).hessian
    whole = gptq(matrix, cover(matrix, levels), Debts.of(hessian))
    monkeypatch.setattr("llmc.passes.precision.rounding.gptq.STRIDE", 5)
    assert (gptq(matrix, cover(matrix, levels), Debts.of(hessian)).integers == whole.integers).mean() > 0.99


@settings(deadline=None, max_examples=30)
@given(npst.arrays(np.float32, (4, 32), elements=st.floats(-8, 8, width=32)), st.booleans())
def test_hqq_is_nowhere_worse_than_nearest_by_its_own_measure(matrix, symmetric):
    levels = Levels(4, 16, symmetric)

    def badness(rounded: Rounded) -> Array:
        return (np.abs(levels.blocks(rounded.matrix() - matrix)) ** NORM).mean(-1)

    # 1e-5: means of 16 powers in float32.
    assert (badness(hqq(matrix, levels)) <= badness(nearest(matrix, levels)) * (1 + 1e-5) + 1e-6).all()


@settings(deadline=None, max_examples=30)
@given(npst.arrays(np.int16, (3, 32)).map(lambda values: values.astype(np.float32) / 64), st.booleans())
def test_a_fitted_grid_has_no_larger_square_error_than_the_covering_one(matrix, symmetric):
    levels = Levels(4, 16, symmetric)
    fitted, covering = (nearest(matrix, levels, grid).matrix() for grid in (fit(matrix, levels), None))
    errors = [np.square(levels.blocks(found - matrix)).sum(-1) for found in (fitted, covering)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


# What is known of activations


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(6)), st.integers(1, 5))
def test_moments_depend_neither_on_the_order_nor_on_the_size_of_batches(order, cut):
    rows = outliers(depth=16, samples=24)[1]
    whole = moments(rows)
    parts = Moments(16)
    for piece in (rows[4 * i : 4 * i + 4] for i in order):
        parts.add(piece[:cut])
        parts.add(piece[cut:])
    # float32 sums of 24 terms, in another order: 24 · 2^-24 of the sum of magnitudes.
    assert np.allclose(parts.magnitude, whole.magnitude, rtol=3e-6)
    assert np.allclose(parts.hessian, whole.hessian, rtol=3e-6, atol=3e-6 * np.diag(whole.hessian).max())


def test_the_hessian_is_the_error_of_the_output():
    matrix, activations = outliers()
    moved = np.random.default_rng(1).standard_normal(matrix.shape)
    hessian = moments(activations).hessian
    predicted = ((moved @ hessian) * moved).sum() / len(matrix)
    assert predicted == pytest.approx(output_error(matrix, matrix + moved, activations), rel=1e-5)  # float32 sums


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=12), st.integers(100, 10000))
def test_batches_keep_the_order_and_fit_in_memory(depths, memory):
    sources = [Source(f"t{i}", -1, depth) for i, depth in enumerate(depths)]
    made = list(batches(sources, memory))
    assert [source for batch in made for source in batch] == sources
    assert all(len(batch) == 1 or sum(source.bytes for source in batch) <= memory for batch in made)
