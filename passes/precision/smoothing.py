"""Finds the numbers that a product's activation is divided by, and moved by, before both its factors become INT8."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmc.passes.graph import Array
from llmc.passes.precision.levels import to_levels
from llmc.passes.precision.rows import ExactProducts, Fold, Rows, Stack

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""How much of the activation's range goes to the weight: tried in turn, beside leaving all as it is."""
SMALLEST = 2.0**-10
"""Least range of a channel of the weight, as a part of the largest: less is taken for this."""


@dataclass(frozen=True)
class Smoothing:
    """x → (x - offset) / scale, each [channels], and the relative errors of the product before and with it."""

    scale: Array
    offset: Array
    alpha: float | None
    plain_error: float
    error: float


def find_smoothing(rows: Rows, weight: Stack, shift: bool, alphas: tuple[float, ...] = ALPHAS) -> Smoothing:
    """The smoothing with which `rows` times `weight` [outputs, channels] loses least in INT8.

    Fitted to each part of the rows and judged on the other: a channel that one part does not show in full clips.
    The error is that of each row relative to its result, without what is the same in all rows (a bias takes that), over
    up to `OUTPUTS` outputs.
    """
    peaks = weight.peaks()
    judged = [
        _Judge(fold, other, weight, peaks, shift) for fold, other in (rows.folds, rows.folds[::-1]) if len(other.rows)
    ]
    tried: tuple[float | None, ...] = (None, *alphas)
    errors = [float(np.mean([judge.error(alpha) for judge in judged])) for alpha in tried]
    best = int(np.argmin(errors))
    plain = float(np.mean([judge.error(None, moved=False) for judge in judged])) if shift else errors[0]
    offset = middle(rows.low, rows.high) if shift else np.zeros_like(rows.low)
    scale = channel_scales(_reach(rows.low, rows.high, offset), peaks, tried[best])
    return Smoothing(scale, offset, tried[best], plain, errors[best])


def middle(low: Array, high: Array) -> Array:
    """What moves each channel's range to both sides of 0 evenly: [channels]."""
    offset: Array = (low + high) / 2
    return offset


def channel_scales(reach: Array, peaks: Array, alpha: float | None) -> Array:
    """SmoothQuant's s = reach^alpha / max|W|^(1 - alpha), their geometric mean 1: float32 [channels]. None: ones.

    `peaks` are max|W| of each channel.

    A channel that reaches less than half of the channels do counts as the middle one: what was quiet on the data, as
    many channels behind a GELU are, may be loud on other data, and would clip at a small part of what it reaches.
    """
    if alpha is None:
        return np.ones_like(reach)
    loud = reach[reach > 0]
    activation = np.maximum(np.where(reach > 0, reach, reach.max()), np.median(loud) if loud.size else 0)
    peaks = np.maximum(np.where(peaks > 0, peaks, peaks.max()), SMALLEST * peaks.max())
    logarithm = alpha * np.log(activation, dtype=np.float64) - (1 - alpha) * np.log(peaks, dtype=np.float64)
    scales: Array = np.exp(logarithm - logarithm.mean()).astype(np.float32)
    return scales


def _reach(low: Array, high: Array, offset: Array) -> Array:
    reach: Array = np.maximum(high - offset, offset - low)
    return reach


class _Judge:
    """Errors of the product on the rows of one part, in INT8 as the other part would have it."""

    def __init__(self, fitted: Fold, judged: Fold, weight: Stack, peaks: Array, shift: bool) -> None:
        seen = fitted if len(fitted.rows) else judged
        self.peaks, self.low, self.high = peaks, seen.low, seen.high
        self.offset = middle(seen.low, seen.high) if shift else np.zeros_like(seen.low)
        self.rows = judged.rows
        self.exact = ExactProducts(judged.rows, weight)

    def error(self, alpha: float | None, moved: bool = True) -> float:
        """Root mean square over the rows of how far each is off, relative to its spread."""
        offset = self.offset if moved else np.zeros_like(self.offset)
        reach = _reach(self.low, self.high, offset)
        scale = channel_scales(reach, self.peaks, alpha)
        rounded = to_levels((self.rows - offset) / scale, (reach / scale).max(keepdims=True))

        def off(weight: Array, exact: Array) -> Array:
            scaled = weight * scale
            levels = to_levels(scaled, np.abs(scaled).max(axis=1, keepdims=True))
            found: Array = rounded @ levels.T + offset @ weight.T - exact
            return found

        return math.sqrt(self.exact.mean_square(off))
