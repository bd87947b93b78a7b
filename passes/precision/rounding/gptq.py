"""GPTQ: rounds the values of a row one after another, each time moving those that are left so as to make up for it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2023), with the
order of columns by their weight in the error ("act-order") and grids that are fixed beforehand.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmc.passes.graph import Array
from llmc.passes.precision.rounding.grid import Grid, Rounded

DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to it."""
STRIDE = 128
"""Columns after which what they owe to the others is paid; changes speed only."""

Nearest = Callable[[int, Array], tuple[Array, Array]]
"""(number of a column, its values [rows]) → the nearest levels, and what they stand for."""


def gptq(matrix: Array, grid: Grid, hessian: Array) -> Rounded:
    """Round `matrix` [rows, depth] to `grid` so that ΣΔ·H·Δᵀ is small, H = `hessian` [depth, depth].

    With H a multiple of the identity this is rounding to nearest. Memory: four matrices float64 [depth, depth].
    """

    def nearest(column: int, values: Array) -> tuple[Array, Array]:
        block = column // grid.levels.block
        scale, zero = grid.scale[:, block], grid.zero[:, block]
        level = np.clip(np.rint(values / scale) + zero, grid.levels.low, grid.levels.high)
        return level, (level - zero) * scale

    return Rounded.of(grid.levels.blocks(one_after_another(matrix, hessian, nearest)), grid)


def one_after_another(matrix: Array, hessian: Array, nearest: Nearest) -> Array:
    """The levels, as float32 [rows, depth], that `nearest` gives column by column, each time after what the columns
    before owe to this one has been paid."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    inverse = _inverse_factor(hessian[np.ix_(order, order)])
    columns = np.ascontiguousarray(matrix.astype(np.float32, copy=False)[:, order].T)
    levels = np.empty_like(columns)
    for start in range(0, len(order), STRIDE):
        stop = min(start + STRIDE, len(order))
        errors = np.empty((stop - start, matrix.shape[0]), np.float32)
        for i in range(start, stop):
            levels[i], values = nearest(int(order[i]), columns[i])
            errors[i - start] = (columns[i] - values) / inverse[i, i]
            columns[i + 1 : stop] -= np.outer(inverse[i, i + 1 : stop], errors[i - start])
        columns[stop:] -= inverse[start:stop, stop:].T @ errors
    restored = np.empty_like(levels)
    restored[order] = levels
    return np.ascontiguousarray(restored.T)


def _inverse_factor(hessian: Array) -> Array:
    """Upper triangular U, float32, with UᵀU the inverse of the damped Hessian."""
    damped = hessian.astype(np.float64)
    mean = float(np.diag(damped).mean())
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0 else 1.0
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
