"""Codebooks: the few values that those of a weight are replaced by, found by weighted k-means.

Lloyd, "Least Squares Quantization in PCM" (1982); weights as in Kim et al., "SqueezeLLM" (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.passes.graph import Array
from llmc.passes.graph.in_parts import on_every_core, row_slices, slices
from llmc.passes.precision.rounding.gptq import Debts, one_after_another

VALUES = 1 << 21
"""That are shared at a time, where more than one codebook is made."""
ITERATIONS = 50
"""Of k-means; on a line it has all but settled by then."""


@dataclass(frozen=True)
class Layout:
    """How a matrix [rows, depth] is cut into parts with a codebook each: `groups` of rows, `blocks` of columns."""

    groups: int
    blocks: int

    def parts(self, matrix: Array) -> Array:
        """[rows, depth] → [groups · blocks, values of each]."""
        rows, depth = matrix.shape
        cut = matrix.reshape(self.groups, rows // self.groups, self.blocks, depth // self.blocks)
        return cut.swapaxes(1, 2).reshape(self.groups * self.blocks, -1)

    @property
    def count(self) -> int:
        return self.groups * self.blocks


@dataclass(frozen=True)
class Shared:
    """A matrix as indices uint8 [rows, depth] into codebooks float32 [groups, blocks, entries], which rise."""

    indices: Array
    codebooks: Array

    def matrix(self) -> Array:
        """What the indices stand for: float32 [rows, depth]."""
        return self.rows(slice(None))

    def rows(self, rows: slice) -> Array:
        """The same of some rows."""
        group, block = _books(self.indices.shape, self.codebooks)
        return self.codebooks[group[rows], block, self.indices[rows]]


def _books(shape: tuple[int, ...], codebooks: Array) -> tuple[Array, Array]:
    """The group of each row [rows, 1], the block of each column [1, depth]."""
    (rows, depth), (groups, blocks, _) = shape, codebooks.shape
    return (np.arange(rows) // (rows // groups))[:, None], (np.arange(depth) // (depth // blocks))[None, :]


def share(matrix: Array, layout: Layout, entries: int, hessian: Array) -> Shared:
    """Codebooks of `entries` values and indices so that ΣΔ·H·Δᵀ is small, H = `hessian` [depth, depth].

    The codebooks make Σ H[k,k]·Δ[n,k]² least; the values are then replaced one after another, each time moving those
    that are left so as to make up for it (GPTQ).
    """
    importance, debts = np.diag(hessian).astype(np.float32), Debts.of(hessian)
    each = len(matrix) // layout.groups

    def books(groups: slice) -> Array:
        part = Layout(groups.stop - groups.start, layout.blocks)
        rows = matrix[groups.start * each : groups.stop * each].astype(np.float32)
        found = kmeans(part.parts(rows), part.parts(np.broadcast_to(importance, rows.shape)), entries)
        return found.reshape(part.groups, part.blocks, entries)

    per_group = each * matrix.shape[1]
    codebooks = np.concatenate(on_every_core(books, slices(layout.groups, VALUES // max(per_group, 1))))
    group, block = (index.ravel() for index in _books(matrix.shape, codebooks))
    midpoints = (codebooks[..., 1:] + codebooks[..., :-1]) / 2

    def indices(rows: slice) -> Array:
        def nearest(column: int, values: Array) -> tuple[Array, Array]:
            found = (values[:, None] > midpoints[group[rows], block[column]]).sum(axis=1)
            return found, codebooks[group[rows], block[column], found]

        return one_after_another(matrix[rows], debts, nearest).astype(np.uint8)

    return Shared(np.concatenate(on_every_core(indices, row_slices(matrix.shape, VALUES))), codebooks)


def kmeans(values: Array, weights: Array, entries: int) -> Array:
    """For each row of `values` [parts, n] the `entries` values, rising, that make Σ weight · distance² small.

    Begins between evenly spaced values and quantiles of those that weigh anything. Weights [parts, n] are not negative;
    where nothing weighs, all do alike. A part with no more different values than entries gets just these.
    """
    order = np.argsort(values, axis=1, kind="stable")
    line = np.take_along_axis(values, order, axis=1).astype(np.float64)
    weight = np.take_along_axis(weights, order, axis=1).astype(np.float64)
    weight = np.where(weight.sum(axis=1, keepdims=True) > 0, weight, 1)
    mass, moment = (_sums(part) for part in (weight, weight * line))
    centres = _beginning(line, mass, entries)
    for _ in range(ITERATIONS):
        bounds = _places(line, (centres[:, 1:] + centres[:, :-1]) / 2)
        inside, sums = (np.diff(np.take_along_axis(part, bounds, axis=1), axis=1) for part in (mass, moment))
        moved = np.where(inside > 0, sums / np.where(inside > 0, inside, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    for part in np.flatnonzero((np.diff(line, axis=1) != 0).sum(axis=1) < entries):
        found = np.unique(line[part])
        centres[part] = np.pad(found, (0, entries - len(found)), mode="edge")
    return np.sort(centres, axis=1).astype(np.float32)


def _beginning(line: Array, mass: Array, entries: int) -> Array:
    """Half way between evenly spaced values and quantiles: [parts, entries]."""
    at = np.linspace(0, 1, 2 * entries + 1)
    quantiles = np.stack(
        [
            row[np.searchsorted(sums[1:], sums[-1] * at).clip(0, len(row) - 1)]
            for row, sums in zip(line, mass, strict=True)
        ]
    )
    first = np.stack([row[np.searchsorted(sums[1:], 0, side="right")] for row, sums in zip(line, mass, strict=True)])
    low, high = first[:, None], quantiles[:, -1:]
    begun: Array = (low + (high - low) * at[1::2] + quantiles[:, 1::2]) / 2
    return begun


def _sums(values: Array) -> Array:
    """Running sums from 0: [parts, n + 1]."""
    return np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, axis=1)], axis=1)


def _places(line: Array, limits: Array) -> Array:
    """How many values of each rising row are at most each limit, from 0 to all: [parts, limits + 2]."""
    parts, count = line.shape
    found = np.stack([np.searchsorted(row, limit, side="right") for row, limit in zip(line, limits, strict=True)])
    return np.concatenate([np.zeros((parts, 1), int), found, np.full((parts, 1), count)], axis=1)
