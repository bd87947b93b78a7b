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
    is bounded is a ratio of sums over samples. A few samples lose far more than the others, and may be missing from
    those drawn: Student's interval, which takes errors to lie evenly around their mean, is corrected for that.

    Source: Cochran, "Sampling Techniques" (1977), chapter 6, for ratios; Hall, "On the Removal of Skewness by
    Transformation" (1992).
    """
    off = _bounded([s.rows - s.cosines for s in samples], [s.rows for s in samples])
    square = _bounded([s.difference for s in samples], [s.signal for s in samples])
    return Judged(1 - off[0], 1 - off[1], math.sqrt(square[0]), math.sqrt(square[1]))


def _bounded(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """Σ parts / Σ wholes, and what it is at most over all data like this; the parts are 0 or more."""
    part, whole = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    if not whole.sum():
        ratio = math.inf if part.any() else 0.0
        return ratio, ratio
    ratio = float(part.sum() / whole.sum())
    off = (part - ratio * whole) / whole.mean()
    spread = float(off.std())
    if not spread > 0:  # no difference between samples, or NaN
        return ratio, ratio + spread
    count = len(part)
    skewness = float(np.mean((off / spread) ** 3))
    error = spread / math.sqrt(count - 1)
    return ratio, ratio + error * _away(count, skewness)


def _away(count: int, skewness: float) -> float:
    """How many standard errors above the mean of `count` values the bound lies."""
    quantile = _student(count - 1)
    bend = skewness / math.sqrt(count)
    if abs(bend) < 1e-6:  # the limit of what follows
        return quantile
    return float(3 / bend * (1 - np.cbrt(1 - bend * (quantile + bend / 6))))


def _student(degrees: int) -> float:
    """The one-sided quantile of Student's t distribution, within 0.1 % from 7 degrees of freedom up.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.7.5.
    """
    x = NormalDist().inv_cdf(CONFIDENCE)
    terms = (x, (x**3 + x) / 4, (5 * x**5 + 16 * x**3 + 3 * x) / 96, (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384)
    return math.fsum(term / degrees**power for power, term in enumerate(terms))
