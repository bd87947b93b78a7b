"""What a few samples say of all data like them: means, and bounds that those keep to with 95 % confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from llmc.passes.precision.distance import Distance

CONFIDENCE = 0.95
LEAST = 8
"""Samples: with fewer, their spread says little."""


@dataclass(frozen=True)
class Judged:
    """How far outputs have moved: on the samples, and at worst on average over all data like them."""

    cosine: float
    cosine_bound: float
    relative_l2: float
    relative_l2_bound: float


def judged(samples: Sequence[Distance]) -> Judged:
    """One distance a sample, `LEAST` or more.

    The rows of one sample (the tokens of one text) are alike, so that only samples count as drawn by themselves: what
    is bounded is a ratio of sums over samples.

    Source: Cochran, "Sampling Techniques" (1977), chapter 6.
    """
    rows, signal = [sample.rows for sample in samples], [sample.signal for sample in samples]
    cosine, cosine_error = _ratio([sample.cosines for sample in samples], rows)
    square, square_error = _ratio([sample.difference for sample in samples], signal)
    away = _student(len(samples) - 1)
    if not sum(rows):
        cosine, cosine_error = 1.0, 0.0
    if not sum(signal):
        square, square_error = (math.inf if any(sample.difference for sample in samples) else 0.0), 0.0
    return Judged(cosine, cosine - away * cosine_error, math.sqrt(square), math.sqrt(square + away * square_error))


def _ratio(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """Σ parts / Σ wholes, and its standard error; NaN where there is nothing to divide by."""
    part, whole = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    if not whole.sum():
        return math.nan, math.nan
    ratio = part.sum() / whole.sum()
    off = part - ratio * whole
    return float(ratio), float(np.sqrt(len(part) / (len(part) - 1) * (off**2).sum()) / whole.sum())


def _student(degrees: int) -> float:
    """The one-sided quantile of Student's t distribution, within 0.1 % from 7 degrees of freedom up.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.7.5.
    """
    x = NormalDist().inv_cdf(CONFIDENCE)
    terms = (x, (x**3 + x) / 4, (5 * x**5 + 16 * x**3 + 3 * x) / 96, (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384)
    return math.fsum(term / degrees**power for power, term in enumerate(terms))
