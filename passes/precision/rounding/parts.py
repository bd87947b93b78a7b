"""Rounds large weights part by part, on every core: float32 copies of a whole weight are never in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

from llmc.passes.graph import Array
from llmc.passes.graph.in_parts import on_every_core, slices
from llmc.passes.precision.rounding.grid import Grid, Levels, Rounded

PART = 1 << 17
"""Values that are rounded at a time: their temporaries stay in the cache of a core."""

ROWS_PART = 1 << 21
"""The same where a row is rounded as a whole."""


class NotFiniteError(ValueError):
    """A weight has NaN or infinity."""


Fit = Callable[[Array, Levels], Grid]
"""(values [rows, depth], levels) → a grid for each block, which depends on that block alone."""


@dataclass(frozen=True)
class Levelled:
    """A weight as integers, laid out as it was."""

    integers: Array
    """int8 or uint8, of the weight's shape."""
    scale: Array
    """float32, of the weight's shape with blocks in the place of values along the axis that is summed."""
    zero: Array
    """As `scale`."""
    clipped: float
    """Share of the values that the level nearest to them would be beyond the last for."""
    error: float
    """L2 norm of what rounding moved, over that of the weight; 0 for a weight of zeros."""


@dataclass(frozen=True)
class Part:
    """Some blocks of a weight, along the axis that a product sums over."""

    axis: int
    place: tuple[slice, ...]
    """In the weight."""
    grids: tuple[slice, ...]
    """In what has a number for each of its blocks."""

    def rows(self, weight: Array) -> Array:
        """Its values, the axis last: float32 [rows, depth]. Raises NotFiniteError."""
        by_rows = np.moveaxis(weight[self.place].astype(np.float32), self.axis, -1)  # in the weight's own order
        rows = by_rows.reshape(-1, by_rows.shape[-1])
        if not np.isfinite(rows).all():
            raise NotFiniteError("it has NaN or infinity")
        return rows

    def put(self, rows: Array, made: Array) -> None:
        """Let `made`, laid out as the weight, have [rows, depth] here."""
        _put(rows, made[self.place], self.axis)

    def put_grids(self, rows: Array, made: Array) -> None:
        """Let `made`, which has a number for each block, have [rows, blocks] here."""
        _put(rows, made[self.grids], self.axis)


def _put(rows: Array, spot: Array, axis: int) -> None:
    by_rows = np.moveaxis(spot, axis, -1)
    by_rows[...] = rows.reshape(by_rows.shape)


def parts_of(shape: tuple[int, ...], axis: int, block: int, *, whole_rows: bool = False) -> list[Part]:
    """The parts of a weight with blocks along `axis`, from 0; with `whole_rows` none of them cuts that axis."""
    unit = shape[axis] if whole_rows else block
    cut = next((i for i, n in enumerate(shape) if n > (unit if i == axis else 1)), 0)
    unit = unit if cut == axis else 1
    values = ROWS_PART if whole_rows else PART
    step = max(values // max(prod(shape) // max(shape[cut], 1), 1) // unit, 1) * unit
    found = []
    for part in slices(shape[cut], step):
        grids = slice(part.start // block, -(-part.stop // block)) if cut == axis else part
        before = (slice(None),) * cut
        found.append(Part(axis, (*before, part), (*before, grids)))
    return found


def grids_of(shape: tuple[int, ...], axis: int, block: int) -> tuple[int, ...]:
    """The shape of what has a number for each block."""
    return tuple(n // block if i == axis else n for i, n in enumerate(shape))


def round_in_parts(weight: Array, axis: int, levels: Levels, fit: Fit) -> Levelled:
    """Round every value to the nearest level on the grids that `fit` gives; blocks run along `axis`, from 0.

    The same on any number of cores. Raises NotFiniteError.
    """
    made = _nothing(weight, axis, levels)

    def work(part: Part) -> Array:
        rows = part.rows(weight)
        blocks, grid = levels.blocks(rows), fit(rows, levels)
        scale, zero = grid.scale[..., None], grid.zero[..., None]
        exact = blocks / scale
        np.rint(exact, out=exact)
        if not levels.symmetric:
            exact += zero
        found = np.clip(exact, levels.low, levels.high)
        beyond = np.count_nonzero(found != exact)
        moved = np.subtract(found, 0 if levels.symmetric else zero, out=exact)
        moved *= scale
        moved -= blocks
        _take(made, part, found, grid)
        return np.array([beyond, square(moved), square(rows)], np.float64)

    return _with_sums(made, on_every_core(work, parts_of(weight.shape, axis, levels.block)))


def round_rows(
    weight: Array, axis: int, levels: Levels, rounding: Callable[[Array], Rounded], hessian: Array
) -> Levelled:
    """The same by a `rounding` of whole rows [rows, depth], each on its own; its error is that of the output, of which
    `hessian` [depth, depth] tells."""
    made = _nothing(weight, axis, levels)

    def work(part: Part) -> Array:
        rows = part.rows(weight)
        rounded = rounding(rows)
        _take(made, part, rounded.integers, rounded.grid)
        moved = rounded.matrix() - rows
        noise, signal = (float(((v @ hessian) * v).sum(dtype=np.float64)) for v in (moved, rows))
        return np.array([rounded.grid.clipped(rows) * rows.size, noise, signal])

    return _with_sums(made, on_every_core(work, parts_of(weight.shape, axis, levels.block, whole_rows=True)))


def _nothing(weight: Array, axis: int, levels: Levels) -> Levelled:
    """Where the parts of a weight find room."""
    grids = grids_of(weight.shape, axis, levels.block)
    kind = np.int8 if levels.symmetric else np.uint8
    return Levelled(np.empty(weight.shape, kind), np.empty(grids, np.float32), np.empty(grids, np.float32), 0, 0)


def _take(made: Levelled, part: Part, integers: Array, grid: Grid) -> None:
    part.put(integers, made.integers)
    part.put_grids(grid.scale, made.scale)
    part.put_grids(grid.zero, made.zero)


def _with_sums(made: Levelled, sums: list[Array]) -> Levelled:
    """With what its parts tell: values beyond the levels, and sums of squares of what was moved and of all."""
    beyond, moved, whole = map(float, sum(sums, np.zeros(3)))
    error = sqrt(max(moved, 0.0) / whole) if whole > 0 else 0.0
    return Levelled(made.integers, made.scale, made.zero, beyond / max(made.integers.size, 1), error)


def square(values: Array) -> float:
    """The sum of squares."""
    flat = values.ravel(order="K")
    return float(np.vdot(flat, flat))
