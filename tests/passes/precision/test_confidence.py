"""Bounds of means: against tables and simulated populations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmc.passes.precision.confidence import judged
from llmc.passes.precision.distance import Distance


def sample(cosines: list[float], difference: float = 0.0, signal: float = 1.0) -> Distance:
    return Distance(sum(cosines), len(cosines), difference, signal)


@pytest.mark.parametrize(("count", "quantile"), [(8, 1.8946), (11, 1.8125), (31, 1.6973), (64, 1.6694)])
def test_of_rows_evenly_around_their_mean_it_is_students_interval(count: int, quantile: float) -> None:
    """The quantiles are those of printed tables, with four digits."""
    values = np.linspace(0.9, 1.0, count)
    found = judged([sample([value]) for value in values])
    assert found.cosine == pytest.approx(values.mean(), abs=1e-12)
    away = (found.cosine - found.cosine_bound) / (values.std(ddof=1) / math.sqrt(count))
    assert away == pytest.approx(quantile, rel=1e-3)


def test_rows_of_one_sample_do_not_count_as_many() -> None:
    """Ten equal rows a sample say what one says."""
    values = np.random.default_rng(0).uniform(0.9, 1.0, 16)
    one, ten = (judged([sample([value] * rows) for value in values]) for rows in (1, 10))
    assert ten.cosine_bound == pytest.approx(one.cosine_bound, abs=1e-12)


def test_ninety_five_of_a_hundred_bounds_hold() -> None:
    """Of samples drawn from a population whose mean is known, with rows of their own number each.

    2000 bounds of 95 % fail 100 times, give or take 10; Student's interval fails some 135 times on errors like these.
    """
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 20, 100_000)
    errors = rng.gamma(1.0, 1e-3, rows.size)
    noise, signal = errors * rows, 1.0 * rows
    mean = 1 - (errors * rows).sum() / rows.sum()
    failed = failed_l2 = 0
    for _ in range(2000):
        drawn = rng.integers(0, rows.size, 128)
        found = judged([Distance((1 - errors[i]) * rows[i], int(rows[i]), noise[i], signal[i]) for i in drawn])
        failed += found.cosine_bound > mean
        failed_l2 += found.relative_l2_bound < math.sqrt(noise.sum() / signal.sum())
    assert 70 <= failed <= 130
    assert 70 <= failed_l2 <= 130


def test_what_did_not_move_is_certain() -> None:
    found = judged([sample([1.0])] * 8)
    assert (found.cosine_bound, found.relative_l2_bound) == (1.0, 0.0)


def test_of_zeros_that_became_something_the_relative_error_is_infinite() -> None:
    assert judged([sample([0.0], difference=1.0, signal=0.0)] * 8).relative_l2_bound == math.inf
    assert judged([sample([1.0], signal=0.0)] * 8).relative_l2_bound == 0.0


def test_a_few_large_errors_make_it_wider() -> None:
    """Two populations of one mean and spread: one error in sixteen far above the rest, and far below."""
    errors = np.full(64, 0.001)
    errors[::16] = 0.005
    mirrored = 2 * errors.mean() - errors
    high, low = (judged([sample([1 - error]) for error in given]) for given in (errors, mirrored))
    assert high.cosine == pytest.approx(low.cosine, abs=1e-12)
    student = 1.6694 * errors.std(ddof=1) / 8
    assert low.cosine - low.cosine_bound < student < high.cosine - high.cosine_bound


def test_nan_is_no_bound() -> None:
    found = judged([sample([1.0], difference=math.nan)] * 8)
    assert math.isnan(found.relative_l2_bound)
