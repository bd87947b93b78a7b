"""AWQ: weights that meet large activations are made larger before they are rounded, and the activations smaller.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2024). There the error of
an output is measured on samples; here it is the same number, worked out from the activations' second moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.passes.graph import Array
from llmc.passes.precision.rounding.grid import Grid, Levels, fit, nearest
from llmc.passes.precision.rounding.moments import Moments

STEPS = 20
"""Exponents from 0 to 1 that the search tries, beside 0 itself."""
ROWS = 256
"""Rows of a matrix, evenly spaced, that the search of scales looks at."""


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
    moved = nearest(matrix, levels, clip(matrix, levels, hessian)).matrix() - matrix
    return float(((moved @ hessian) * moved).sum())


def clip(matrix: Array, levels: Levels, hessian: Array) -> Grid:
    """For each block the grid whose clipping and rounding moves the block's part of the output least by."""
    size = levels.block

    def error(moved: Array, block: int) -> Array:
        part = slice(block * size, (block + 1) * size)
        found: Array = ((moved @ hessian[part, part]) * moved).sum(axis=-1)
        return found

    return fit(matrix, levels, error)
