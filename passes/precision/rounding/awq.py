"""AWQ: weights that meet large activations are made larger before they are rounded, and the activations smaller.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2024). There the error of
an output is measured on samples; here it is the same number, worked out from the activations' second moments. There a
block is clipped as if the others were exact; here with regard to how they are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.passes.graph import Array
from llmc.passes.precision.rounding.grid import SHRINKS, Grid, Levels, fit, nearest
from llmc.passes.precision.rounding.moments import Moments

STEPS = 20
"""Exponents from 0 to 1 that the search of scales tries, beside 0 itself."""
ROWS = 256
"""Rows of a matrix, evenly spaced, that it looks at."""
COARSE = SHRINKS[::3]
"""Parts of a block's range that it tries."""
SWEEPS = 2
"""How often each block is clipped anew, beside what the others have come to."""


def channel_scales(matrices: Sequence[Array], levels: Levels, moments: Moments) -> Array:
    """The factors [depth] for the channels of `matrices` [rows, depth], which all multiply the same activations.

    They are powers of the activations' mean magnitudes: the power in 0 … 1 with which clipping and rounding to nearest
    moves the outputs least; all 1 where that is 0.
    """
    chosen = [matrix[:: -(-len(matrix) // ROWS)].astype(np.float32, copy=False) for matrix in matrices]
    best, least = np.ones(moments.depth, np.float32), np.inf
    for power in np.linspace(0, 1, STEPS + 1):
        scales = _powers(moments.magnitude, float(power))
        scaled = moments.divided(scales).hessian
        error = sum(_output_error(matrix * scales, levels, scaled) for matrix in chosen)
        if error < least:
            best, least = scales, error
    return best


def _powers(magnitude: Array, power: float) -> Array:
    """Around 1; channels that are always 0 count as the smallest of the others."""
    present = magnitude[magnitude > 0]
    floor = present.min() if len(present) else 1.0
    scales = np.maximum(magnitude, floor) ** power
    centred: Array = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
    return centred


def _output_error(matrix: Array, levels: Levels, hessian: Array) -> float:
    moved = nearest(matrix, levels, clip(matrix, levels, hessian, COARSE)).matrix() - matrix
    return float(((moved @ hessian) * moved).sum())


def clip(matrix: Array, levels: Levels, hessian: Array, shrinks: Array = SHRINKS) -> Grid:
    """For each block the grid whose clipping and rounding moves the block's part of the output least by."""

    def error(moved: Array, block: int) -> Array:
        part = levels.part(block)
        found: Array = ((moved @ hessian[part, part]) * moved).sum(axis=-1)
        return found

    return fit(matrix, levels, error, shrinks)


def clip_together(matrix: Array, levels: Levels, hessian: Array) -> Grid:
    """For each block the grid that moves the whole output least, beside what rounding the other blocks moves it by.

    Blocks are taken one after another, `SWEEPS` times, from the grids of `clip` on.
    """
    grid = clip(matrix, levels, hessian)
    scale, zero = grid.scale.copy(), grid.zero.copy()
    moved = nearest(matrix, levels, grid).matrix() - matrix
    for block in (*range(levels.count(matrix)),) * SWEEPS:
        part = levels.part(block)
        values, own = matrix[:, part], hessian[part, part]
        others = moved @ hessian[:, part] - moved[:, part] @ own

        def error(change: Array, _: int, own: Array = own, others: Array = others) -> Array:
            found: Array = ((change @ own + 2 * others) * change).sum(axis=-1)
            return found

        found = fit(values, levels, error)
        moved[:, part] = nearest(values, levels, found).matrix() - values
        scale[:, block], zero[:, block] = found.scale[:, 0], found.zero[:, 0]
    return Grid(levels, scale, zero)
