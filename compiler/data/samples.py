"""A set of samples, each the inputs of one run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from llmc.compiler.loaders import Feeds
from llmc.passes.graph import Graph, Tensor, Variable

Sizes = Mapping[str, int]
"""Symbolic dimension → its size."""


@dataclass(frozen=True)
class Samples:
    """A set of samples: one run's inputs each, made anew every time the set is gone through.

    A sample of a model with a batch dimension has batch 1 and no padding where the data allows it, so that
    statistics depend neither on how samples are batched nor on their order.
    """

    name: str
    """The file or folder, or 'random inputs'."""
    digest: str
    """SHA-256 of what the samples are made from."""
    random: bool
    """True where they were drawn, and say nothing about real data."""
    count: int
    make: Callable[[], Iterable[Feeds]]
    """The samples from the first on, `count` or more."""
    packages: tuple[str, ...] = ()
    """Whose versions have a say in the values; they count in the digest."""

    def __len__(self) -> int:
        return self.count

    def first(self, count: int) -> Samples:
        """The first `count` samples; all of them where there are no more."""
        return replace(self, count=min(count, self.count))

    def after(self, count: int) -> Samples:
        """What follows the first `count` samples."""
        rest = max(self.count - count, 0)
        digest = hashlib.sha256(f"{self.digest} after {count}".encode()).hexdigest()
        return replace(self, count=rest, digest=digest, make=lambda: islice(self.make(), count, None))

    def __iter__(self) -> Iterator[Feeds]:
        return islice(self.make(), self.count)


def graph_inputs(graph: Graph) -> list[Tensor]:
    """The inputs as they are now; passes that change the graph later do not change the samples."""
    return [Variable(tensor.name, dtype=tensor.dtype, shape=tensor.shape) for tensor in graph.inputs]
