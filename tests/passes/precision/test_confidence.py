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
def test_of_one_row_a_sample_it_is_students_interval(count: int, quantile: float) -> None:
    """The quantiles are those of printed tables, with four digits."""
    values = np.random.default_rng(count).uniform(0.9, 1.0, count)
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

    1000 bounds of 95 % fail 50 times, give or take 7; ratios and skewed errors cost a little of that.
    """
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 20, 100_000)
    errors = rng.gamma(2.0, 5e-4, rows.size)
    noise, signal = errors * rows, 1.0 * rows
    mean = 1 - (errors * rows).sum() / rows.sum()
    failed = failed_l2 = 0
    for _ in range(1000):
        drawn = rng.integers(0, rows.size, 64)
        found = judged([Distance((1 - errors[i]) * rows[i], int(rows[i]), noise[i], signal[i]) for i in drawn])
        failed += found.cosine_bound > mean
        failed_l2 += found.relative_l2_bound < math.sqrt(noise.sum() / signal.sum())
    assert 25 <= failed <= 90
    assert 25 <= failed_l2 <= 90


def test_what_did_not_move_is_certain() -> None:
    found = judged([sample([1.0])] * 8)
    assert (found.cosine_bound, found.relative_l2_bound) == (1.0, 0.0)


def test_of_zeros_that_became_something_the_relative_error_is_infinite() -> None:
    assert judged([sample([0.0], difference=1.0, signal=0.0)] * 8).relative_l2_bound == math.inf
    assert judged([sample([1.0], signal=0.0)] * 8).relative_l2_bound == 0.0


def test_nan_is_no_bound() -> None:
    found = judged([sample([1.0], difference=math.nan)] * 8)
    assert math.isnan(found.relative_l2_bound)
