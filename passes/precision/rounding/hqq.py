"""HQQ: fits scales and zero points to the weights alone, so that few values are far off rather than none a little.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): the error |W - DQ(Q(W))|^p with
p < 1 is split off as a variable of its own, which is shrunk and subtracted in turn. There the zero point is fitted, as
a float; where levels are symmetric it is 0, so the scale is fitted, and where they are not, both.
"""

from __future__ import annotations

import numpy as np

from llmc.passes.graph import Array
from llmc.passes.precision.rounding.grid import Grid, Levels, Rounded, cover, nearest, positive

NORM = 0.7
SHARPNESS = 10.0
"""Of the split at first; errors are in steps of the grid."""
GROWTH = 1.01
ITERATIONS = 20


def hqq(matrix: Array, levels: Levels) -> Rounded:
    """Round `matrix` [rows, depth] to nearest, on grids fitted to it."""
    return nearest(matrix, levels, fitted(matrix, levels))


def fitted(matrix: Array, levels: Levels) -> Grid:
    """A grid for each block of `matrix` [rows, depth]: the best that was seen while it was fitted."""
    blocks = levels.blocks(matrix)
    grid = best = cover(matrix, levels)
    least = _error(blocks, grid)
    sharpness = SHARPNESS
    for _ in range(ITERATIONS):
        rounded = grid.round(blocks)
        step = grid.scale[..., None]
        outliers = _shrink((blocks - grid.values(rounded)) / step, sharpness) * step
        grid = _refit(blocks - outliers, rounded, grid)
        found = _error(blocks, grid)
        better = found < least
        least = np.where(better, found, least)
        best = Grid(levels, np.where(better, grid.scale, best.scale), np.where(better, grid.zero, best.zero))
        sharpness *= GROWTH
    return best


def _error(blocks: Array, grid: Grid) -> Array:
    """Mean of |error|^p for each block."""
    mean: Array = (np.abs(blocks - grid.values(grid.round(blocks))) ** NORM).mean(axis=-1)
    return mean


def _shrink(error: Array, sharpness: float) -> Array:
    """Generalized soft threshold of errors in steps: nearly the e with the least |e|^p + sharpness/2 · (e - error)²."""
    magnitude = np.abs(error)
    threshold = np.where(magnitude > 0, magnitude, 1) ** (NORM - 1) / sharpness
    return np.sign(error) * np.maximum(magnitude - threshold, 0)


def _refit(blocks: Array, rounded: Array, grid: Grid) -> Grid:
    """Scale, and zero where there is one, with the least square error for values that keep their levels."""
    centred = rounded - grid.zero[..., None]
    power = (centred**2).sum(axis=-1)
    scale = (blocks * centred).sum(axis=-1) / np.maximum(power, 1)
    scale = positive(np.where((power > 0) & (scale > 0), scale, grid.scale))
    if grid.levels.symmetric:
        return Grid(grid.levels, scale, grid.zero)
    zero = np.rint((rounded - blocks / scale[..., None]).mean(axis=-1))
    return Grid(grid.levels, scale, np.clip(zero, grid.levels.low, grid.levels.high))
