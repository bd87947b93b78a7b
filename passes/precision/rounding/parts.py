"""Rounds large weights part by part, on every core: float32 copies of a whole weight are never in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import numpy as np

from llmc.passes.graph import Array
from llmc.passes.precision.rounding.grid import Grid, Levels

PART = 1 << 17
"""Values that are rounded at a time: their temporaries stay in the cache of a core."""

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


def round_in_parts(weight: Array, axis: int, levels: Levels, fit: Fit) -> Levelled:
    """Round every value to the nearest level on the grids that `fit` gives; blocks run along `axis`, from 0.

    The same on any number of cores. Raises ValueError for values that are not finite.
    """
    grids = tuple(n // levels.block if i == axis else n for i, n in enumerate(weight.shape))
    kind = np.int8 if levels.symmetric else np.uint8
    made = Levelled(np.empty(weight.shape, kind), np.empty(grids, np.float32), np.empty(grids, np.float32), 0, 0)

    def work(place: tuple[slice, ...]) -> Array:
        return _round_part(weight[place], axis, levels, fit, made, place)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        sums = sum(pool.map(work, _places(weight.shape, axis, levels.block)), np.zeros(3))
    beyond, moved, whole = map(float, sums)
    error = sqrt(moved / whole) if whole else 0.0
    return Levelled(made.integers, made.scale, made.zero, beyond / max(weight.size, 1), error)


def _places(shape: tuple[int, ...], axis: int, block: int) -> Iterator[tuple[slice, ...]]:
    """Where the parts stand: slices of the first axis that can be cut, whole blocks each."""
    cut = next((i for i, n in enumerate(shape) if n > (block if i == axis else 1)), 0)
    unit = block if cut == axis else 1
    step = max(PART // max(prod(shape) // max(shape[cut], 1), 1) // unit, 1) * unit
    before = (slice(None),) * cut
    for start in range(0, shape[cut], step):
        yield (*before, slice(start, min(start + step, shape[cut])))


def _round_part(
    values: Array, axis: int, levels: Levels, fit: Fit, made: Levelled, place: tuple[slice, ...]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Round one part into its place in `made`; how many values are beyond the levels, and the sums of squares of what
    was moved and of all."""
    by_rows = np.moveaxis(values.astype(np.float32), axis, -1)  # a view: memory stays in the weight's own order
    rows = by_rows.reshape(-1, by_rows.shape[-1])
    if not np.isfinite(rows).all():
        raise ValueError("it has NaN or infinity")
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

    def back(array: Array) -> Array:
        return np.moveaxis(array.reshape(*by_rows.shape[:-1], -1), -1, axis)

    made.integers[place] = back(found)
    scaled = tuple(_in_blocks(part, levels.block) if i == axis else part for i, part in enumerate(place))
    made.scale[scaled], made.zero[scaled] = back(grid.scale), back(grid.zero)
    return np.array([beyond, _square(moved), _square(rows)], np.float64)


def _square(values: Array) -> float:
    """The sum of squares."""
    flat = values.ravel(order="K")
    return float(np.vdot(flat, flat))


def _in_blocks(part: slice, block: int) -> slice:
    """Where the grids of some values stand."""
    return part if part.start is None else slice(part.start // block, -(-part.stop // block))
