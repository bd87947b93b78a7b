"""A bounded sample of the rows of an activation, and the range of each channel, for searches by output error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np

from llmc.passes.base import Activations, LlmcError, Measured
from llmc.passes.graph import Array, Graph
from llmc.passes.graph.in_parts import on_every_core, row_slices

Found = TypeVar("Found")
FOLDS = 2
"""Parts that the rows fall into. What is fitted to one is judged on the other: rows not seen decide."""
KEPT = 256
"""Rows that are kept of each part."""
OUTPUTS = 2048
"""Outputs of the products of one activation that are worked out at most: their mean error was within 2 % of that of
16,000, for weights with heavy tails too."""


@dataclass
class Fold:
    """One part of the rows: the range of its channels over all of them, and those kept."""

    low: Array
    """[channels]."""
    high: Array
    """[channels]."""
    digests: Array
    """[rows kept]: uint64, rising."""
    rows: Array
    """[rows kept, channels]: float32."""


@dataclass
class Rows:
    """What is remembered of an activation [rows, channels]. The same rows give the same, in any order and batches.

    A row's part, and whether it is kept, follow from a digest of its values.
    """

    channels: int
    folds: list[Fold] = field(init=False)

    def __post_init__(self) -> None:
        def fold() -> Fold:
            nothing = np.full(self.channels, np.inf, np.float32)
            return Fold(nothing, -nothing, np.empty(0, np.uint64), np.empty((0, self.channels), np.float32))

        self.folds = [fold() for _ in range(FOLDS)]

    def add(self, rows: Array) -> None:
        """Take in activations [rows, channels], finite, of any float type."""
        rows = np.ascontiguousarray(rows, np.float32)
        digests = digest(rows)
        for number, fold in enumerate(self.folds):
            mine = digests % np.uint64(FOLDS) == number
            if mine.any():
                _add(fold, rows[mine], digests[mine])

    @property
    def low(self) -> Array:
        """The least value of each channel: [channels]."""
        least: Array = np.minimum.reduce([fold.low for fold in self.folds])
        return least

    @property
    def high(self) -> Array:
        """The largest value of each channel: [channels]."""
        largest: Array = np.maximum.reduce([fold.high for fold in self.folds])
        return largest

    def measured(self) -> Measured:
        """All of it, as arrays."""
        return {f"{name}{i}": value for i, fold in enumerate(self.folds) for name, value in vars(fold).items()}

    @classmethod
    def of(cls, channels: int, measured: Measured) -> Rows:
        """What `measured` was made of."""
        rows = cls(channels)
        names = ("low", "high", "digests", "rows")
        rows.folds = [Fold(*(measured[f"{name}{i}"] for name in names)) for i in range(FOLDS)]
        return rows


def _add(fold: Fold, rows: Array, digests: Array) -> None:
    fold.low = np.minimum(fold.low, rows.min(axis=0))
    fold.high = np.maximum(fold.high, rows.max(axis=0))
    together = np.concatenate([fold.digests, digests])
    kept = np.argsort(together, kind="stable")[:KEPT]
    old = len(fold.digests)
    fold.rows = np.stack([fold.rows[i] if i < old else rows[i - old] for i in kept])
    fold.digests = together[kept]


def digest(rows: Array) -> Array:
    """A number for each row of float32 [rows, channels] → uint64 [rows]: a weighted sum of its bits, mixed."""
    weights = np.random.default_rng(0).integers(0, 1 << 63, rows.shape[1], np.uint64) * 2 + 1
    value = (rows.view(np.uint32) * weights).sum(axis=1, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64, Steele et al. (2014)
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    mixed: Array = value ^ (value >> np.uint64(31))
    return mixed


def gather_rows(activations: Activations, graph: Graph, channels: Mapping[str, int], samples: int) -> dict[str, Rows]:
    """The rows of each tensor, of so many channels along its last axis, in one pass over the samples or known before.

    Raises LlmcError where a tensor is NaN or infinite.
    """

    def measure(names: Sequence[str]) -> dict[str, Measured]:
        found = _gather(activations, graph, {name: channels[name] for name in names}, samples)
        return {name: rows.measured() for name, rows in found.items()}

    known = activations.recall(graph, __name__, channels, samples, measure)
    return {name: Rows.of(channels[name], measured) for name, measured in known.items()}


def _gather(activations: Activations, graph: Graph, channels: Mapping[str, int], samples: int) -> dict[str, Rows]:
    found = {name: Rows(size) for name, size in channels.items()}
    for number, values in activations.stream(graph, list(channels), samples):
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise LlmcError(
                    f"calibration: tensor '{name}' is NaN or infinite on sample {number}; "
                    "remove that sample, or exclude the nodes that use the tensor"
                )
            found[name].add(value.reshape(-1, channels[name]))
    return found


def batched(channels: Mapping[str, int], memory: int) -> list[dict[str, int]]:
    """The tensors in lists whose rows fit in `memory` bytes together; one that alone does not is alone."""
    parts: list[dict[str, int]] = [{}]
    used = 0
    for name, size in channels.items():
        need = size * 4 * FOLDS * (KEPT + 4)
        if parts[-1] and used + need > memory:
            parts.append({})
            used = 0
        parts[-1][name] = size
        used += need
    return parts if parts[0] else []


@dataclass(frozen=True)
class Stack:
    """Constant matrices [outputs, depth] of one depth, one under the other; read as float32, some outputs at a time."""

    matrices: Sequence[Array]
    """Of any float type, mapped or in memory."""

    @cached_property
    def _parts(self) -> list[tuple[int, Array]]:
        parts = [matrix[some] for matrix in self.matrices for some in row_slices(matrix.shape)]
        return list(enumerate(parts))

    @property
    def outputs(self) -> int:
        """Of all matrices."""
        return sum(len(matrix) for matrix in self.matrices)

    def thinned(self) -> Stack:
        """Every n-th output, so that there are `OUTPUTS` at most: what is lost on average shows in that many."""
        return Stack([matrix[:: -(-self.outputs // OUTPUTS)] for matrix in self.matrices])

    def each(self, work: Callable[[int, Array], Found]) -> list[Found]:
        """What `work` gives for the number of a part and its values, float32 [some outputs, depth], on every core."""
        return on_every_core(lambda part: work(part[0], part[1].astype(np.float32)), self._parts)

    def peaks(self) -> Array:
        """The largest magnitude of each column: float32 [depth]."""
        found: Array = np.maximum.reduce(self.each(lambda _, weight: np.abs(weight).max(axis=0)))
        return found


class ExactProducts:
    """rows [n, depth] · weightᵀ, and how far other products are from them."""

    def __init__(self, rows: Array, weight: Stack) -> None:
        self._weight = weight
        self._values = weight.each(lambda _, part: rows @ part.T)
        spread = sum(_squares_of_rows(values) for values in self._values) / weight.outputs
        self._importance = 1 / np.maximum(spread, np.finfo(np.float32).tiny)

    def mean_square(self, off: Callable[[Array, Array], Array]) -> float:
        """Of errors, each row relative to the spread of its result.

        `off` gives, for some of the weight [outputs, depth] and their exact products [n, outputs], how far others are
        from these. What is the same in all rows does not count, since a bias takes it.
        """
        parts = self._weight.each(lambda number, part: _squares_of_rows(off(part, self._values[number])))
        return float(np.mean(sum(parts) / self._weight.outputs * self._importance))


def _squares_of_rows(values: Array) -> Array:
    """The sum of squares of each row, without what is the same in all rows: float64 [rows]."""
    moved = values - values.mean(axis=0)
    found: Array = np.einsum("ij,ij->i", moved, moved, dtype=np.float64)
    return found
