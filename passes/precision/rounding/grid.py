"""Grids of levels that the values of a weight are rounded to, one for each block of consecutive values of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from llmc.passes.graph import Array, numpy_dtype
from llmc.passes.precision.scales import rounded_up

TYPES = {
    (4, True): onnx.TensorProto.INT4,
    (4, False): onnx.TensorProto.UINT4,
    (8, True): onnx.TensorProto.INT8,
    (8, False): onnx.TensorProto.UINT8,
}
"""(bits, symmetric) → the type of the integers."""
SHRINKS = np.linspace(1.0, 0.5, 26)
"""Parts of a block's range that a search tries."""

Error = Callable[[Array, int], Array]
"""(what rounding moved values by [rows, block], number of the block) → how bad that is, for each row [rows]."""


@dataclass(frozen=True)
class Levels:
    """The integers that there are, and how many values share a scale."""

    bits: int
    block: int
    """Values of a row with one scale; the depth of the matrix where a row has one."""
    symmetric: bool = True

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        return self.low + (1 << self.bits) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """int4, int8 where symmetric, else uint4, uint8."""
        return numpy_dtype(TYPES[self.bits, self.symmetric])

    def blocks(self, matrix: Array) -> Array:
        """[rows, depth] → [rows, blocks, block], a view."""
        return matrix.reshape(len(matrix), -1, self.block)

    def count(self, matrix: Array) -> int:
        """Of the blocks of a row."""
        return int(matrix.shape[1]) // self.block

    def part(self, block: int) -> slice:
        """The columns of a block."""
        return slice(block * self.block, (block + 1) * self.block)


@dataclass(frozen=True)
class Grid:
    """value = (level - zero) · scale, with scale and zero float32 [rows, blocks]; zeros are whole numbers."""

    levels: Levels
    scale: Array
    zero: Array

    def round(self, blocks: Array) -> Array:
        """The nearest levels, as float32, of values [rows, blocks, block]; ties to even."""
        levels = np.rint(blocks / self.scale[..., None]) + self.zero[..., None]
        return np.clip(levels, self.levels.low, self.levels.high, out=levels)

    def clipped(self, matrix: Array) -> float:
        """Share of the values [rows, depth] that the level nearest to them would be beyond the last for."""
        exact = np.rint(self.levels.blocks(matrix) / self.scale[..., None]) + self.zero[..., None]
        beyond = np.count_nonzero((exact < self.levels.low) | (exact > self.levels.high))
        return beyond / max(exact.size, 1)

    def values(self, levels: Array) -> Array:
        """What levels [rows, blocks, block] stand for."""
        return (levels - self.zero[..., None]) * self.scale[..., None]

    def column(self, block: int) -> Grid:
        """The grid of one block of each row, as if the matrix had no other."""
        part = np.s_[:, block : block + 1]
        return Grid(self.levels, self.scale[part], self.zero[part])


@dataclass(frozen=True)
class Rounded:
    """A matrix as integers [rows, depth], of the type of their Levels, and the grid that they lie on."""

    integers: Array
    grid: Grid

    @classmethod
    def of(cls, levels: Array, grid: Grid) -> Rounded:
        """From levels [rows, blocks, block] in any type."""
        return cls(levels.reshape(len(levels), -1).astype(grid.levels.dtype), grid)

    def matrix(self) -> Array:
        """What the integers stand for: float32 [rows, depth]."""
        blocks = self.grid.levels.blocks(self.integers.astype(np.float32))
        return self.grid.values(blocks).reshape(self.integers.shape)


def cover(matrix: Array, levels: Levels, shrink: float | Array = 1.0) -> Grid:
    """The grid that spans `shrink` times the range of each block; at 1 no value is beyond it by more than rounding.

    Symmetric: scale = amax / 7 for 4 bits, zero 0. Asymmetric: (max - min) / 15, of a range that holds 0.
    `shrink` broadcasts with [rows, blocks].
    """
    blocks = levels.blocks(matrix)
    if levels.symmetric:
        scale = positive(np.abs(blocks).max(axis=-1) * shrink / levels.high)
        return Grid(levels, scale, np.zeros_like(scale))
    least, most = np.minimum(blocks.min(axis=-1), 0) * shrink, np.maximum(blocks.max(axis=-1), 0) * shrink
    scale = positive((most - least) / levels.high)
    return Grid(levels, scale, np.clip(np.rint(-least / scale), levels.low, levels.high))


def positive(scale: Array) -> Array:
    """Scales as float32 that float16 has too; 1 where the scale is 0."""
    return rounded_up(np.where(scale > 0, scale, 1), np.dtype(np.float32))


def fit(matrix: Array, levels: Levels, error: Error | None = None, shrinks: Array = SHRINKS) -> Grid:
    """For each block the grid with the least error of those that span one of `shrinks` of its range.

    The error is the sum of squares, or what `error` makes of one block's.
    """
    best = cover(matrix, levels)
    least = np.full(best.scale.shape, np.inf, np.float32)
    blocks = levels.blocks(matrix)
    for shrink in shrinks:
        grid = cover(matrix, levels, shrink)
        moved = grid.values(grid.round(blocks)) - blocks
        if error is None:
            found = (moved**2).sum(axis=-1)
        else:
            found = np.stack([error(moved[:, i], i) for i in range(moved.shape[1])], axis=1)
        better = found < least
        least = np.where(better, found, least)
        best = Grid(levels, np.where(better, grid.scale, best.scale), np.where(better, grid.zero, best.zero))
    return best


def nearest(matrix: Array, levels: Levels, grid: Grid | None = None) -> Rounded:
    """Every value to the nearest level, on the grid that covers the blocks where none is given."""
    grid = grid or cover(matrix, levels)
    return Rounded.of(grid.round(levels.blocks(matrix)), grid)
