"""What calibrated rounding knows of the activations that a weight multiplies: their magnitudes and second moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmc.passes.base import Activations, LlmcError
from llmc.passes.graph import Array, Graph


@dataclass(frozen=True)
class Source:
    """A tensor that weights multiply, along one of its axes."""

    tensor: str
    axis: int
    depth: int
    """Size of that axis."""

    @property
    def bytes(self) -> int:
        """Memory that its moments take."""
        return 4 * self.depth * (self.depth + 1)


@dataclass
class Moments:
    """Sums over the rows of activations [rows, depth], taken in as they come; in any order they give the same."""

    depth: int
    rows: int = 0
    total: Array = field(init=False)
    products: Array = field(init=False)

    def __post_init__(self) -> None:
        self.total = np.zeros(self.depth, np.float32)
        self.products = np.zeros((self.depth, self.depth), np.float32)

    def add(self, rows: Array) -> None:
        """Take in activations [rows, depth]."""
        rows = rows.astype(np.float32, copy=False)
        self.rows += len(rows)
        self.total += np.abs(rows).sum(axis=0)
        self.products += rows.T @ rows

    @property
    def magnitude(self) -> Array:
        """Mean magnitude of each channel: [depth]."""
        return self.total / max(self.rows, 1)

    @property
    def hessian(self) -> Array:
        """Mean outer product of a row with itself [depth, depth]: δᵀ·H·δ is the mean square of what moving a row of
        the weight by δ moves its output by."""
        return self.products / max(self.rows, 1)

    def divided(self, scales: Array) -> Moments:
        """The moments of the activations divided by `scales` [depth]."""
        made = Moments(self.depth, self.rows)
        made.total = self.total / scales
        made.products = self.products / np.outer(scales, scales)
        return made


def gather(activations: Activations, graph: Graph, sources: Sequence[Source], samples: int) -> dict[Source, Moments]:
    """The moments of each source over at most `samples` samples, in one pass over them.

    Raises LlmcError where an activation is NaN or infinite.
    """
    moments = {source: Moments(source.depth) for source in sources}
    tensors = list(dict.fromkeys(source.tensor for source in sources))
    for number, values in activations.stream(graph, tensors, samples):
        for source, rows in _rows(sources, values):
            if not np.isfinite(rows).all():
                raise LlmcError(
                    f"calibration: tensor '{source.tensor}' is NaN or infinite on sample {number}; "
                    "remove that sample, or exclude the nodes that use the tensor"
                )
            moments[source].add(rows)
    return moments


def _rows(sources: Sequence[Source], values: Mapping[str, Array]) -> Iterator[tuple[Source, Array]]:
    for source in sources:
        yield source, np.moveaxis(values[source.tensor], source.axis, -1).reshape(-1, source.depth)


def batches(sources: Sequence[Source], memory: int) -> Iterator[list[Source]]:
    """`sources` in order, in lists whose moments fit in `memory` bytes together; one that alone does not is alone."""
    batch: list[Source] = []
    for source in sources:
        if batch and sum(s.bytes for s in batch) + source.bytes > memory:
            yield batch
            batch = []
        batch.append(source)
    if batch:
        yield batch
