"""GPTQ: rounds the values of a row one after another, each time moving those that are left so as to make up for it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2023), with the
order of columns by their weight in the error ("act-order") and grids that are fixed beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmc.passes.graph import Array
from llmc.passes.precision.rounding.grid import Grid, Rounded

DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to it."""
STRIDE = 128
"""Columns after which what they owe to the others is paid; changes speed only."""

Nearest = Callable[[int, Array], tuple[Array, Array]]
"""(number of a column, its values [rows]) → the nearest levels, and what they stand for."""


BLOCK = 256
"""Rows and columns that are factored and inverted at a time."""


@dataclass(frozen=True)
class Debts:
    """What each column's error costs the columns after it, in the order in which they are rounded."""

    order: Array
    """Columns, those of the most weight in the error first: [depth]."""
    factor: Array
    """Upper triangular U, float32 [depth, depth], with UᵀU the inverse of the damped Hessian in that order."""

    @classmethod
    def of(cls, hessian: Array) -> Debts:
        """Of a Hessian [depth, depth]. Memory: a matrix float64 [depth, depth], and what is given back."""
        order = np.argsort(-np.diag(hessian), kind="stable")
        return cls(order, _inverse_factor(hessian, order))


def gptq(matrix: Array, grid: Grid, debts: Debts) -> Rounded:
    """Round `matrix` [rows, depth] to `grid` so that ΣΔ·H·Δᵀ is small, H the Hessian [depth, depth] of `debts`.

    With H a multiple of the identity this is rounding to nearest. No row depends on another.
    """

    def nearest(column: int, values: Array) -> tuple[Array, Array]:
        block = column // grid.levels.block
        scale, zero = grid.scale[:, block], grid.zero[:, block]
        level = np.clip(np.rint(values / scale) + zero, grid.levels.low, grid.levels.high)
        return level, (level - zero) * scale

    return Rounded.of(grid.levels.blocks(one_after_another(matrix, debts, nearest)), grid)


def one_after_another(matrix: Array, debts: Debts, nearest: Nearest) -> Array:
    """The levels, as float32 [rows, depth], that `nearest` gives column by column, each time after what the columns
    before owe to this one has been paid."""
    order, inverse = debts.order, debts.factor
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


def _inverse_factor(hessian: Array, order: Array) -> Array:
    """Upper triangular U, float32, with UᵀU the inverse of the damped Hessian, its rows and columns in this order.

    With the order turned round, H = L·Lᵀ; turned back, L⁻¹ is U. All of it happens in one matrix.
    """
    held = np.empty(hessian.shape, np.float64)
    turned = order[::-1]
    for begin in range(0, len(held), BLOCK):
        held[begin : begin + BLOCK] = hessian[np.ix_(turned[begin : begin + BLOCK], turned)]
    mean = float(np.diag(held).mean())
    held[np.diag_indices_from(held)] += DAMPING * mean if mean > 0 else 1.0
    _factor(held)
    _invert(held)
    return np.ascontiguousarray(held[::-1, ::-1], np.float32)


def _factor(held: Array) -> None:
    """Cholesky, in place: the lower triangle becomes L with L·Lᵀ what stood there; above the diagonal, zeros."""
    size = len(held)
    for begin in range(0, size, BLOCK):
        end = min(begin + BLOCK, size)
        here = slice(begin, end)
        held[here, here] = np.linalg.cholesky(held[here, here])
        held[here, end:] = 0
        held[end:, here] = held[end:, here] @ np.linalg.inv(held[here, here]).T
        for left in range(end, size, BLOCK):
            columns = slice(left, min(left + BLOCK, size))
            held[left:, columns] -= held[left:, here] @ held[columns, here].T


def _invert(held: Array) -> None:
    """The inverse of a lower triangular matrix, in place."""
    for begin in range(0, len(held), BLOCK):
        end = min(begin + BLOCK, len(held))
        inverse = np.linalg.inv(held[begin:end, begin:end])
        held[begin:end, :begin] = -inverse @ (held[begin:end, :begin] @ held[:begin, :begin])
        held[begin:end, begin:end] = np.tril(inverse)
