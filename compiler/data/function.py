"""Samples that a Python function of the user's own yields."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.data.fit import fit
from llmc.compiler.data.samples import Samples, graph_inputs
from llmc.compiler.errors import LlmcError
from llmc.compiler.functions import code_of, load_function, told
from llmc.compiler.loaders import Feeds
from llmc.passes.graph import Array, Graph, Tensor


def from_function(path: Path, graph: Graph, count: int | None) -> Samples:
    """At most `count` samples: the function in `path` is called, and what it yields gone through, for every round.

    The first round is at once: the digest is of the values, and of the function's file.
    """
    yields = _Yields(path.name, load_function(path.name, path.parent, "data function"), graph_inputs(graph))
    digests = [_digest(feeds) for feeds in islice(yields.round(), count)]
    if not digests:
        raise LlmcError(f"{path.name} yields no samples")
    digest = hashlib.sha256("\n".join([code_of(yields.function), *digests]).encode()).hexdigest()
    return Samples(path.name, digest, False, len(digests), lambda: yields.same(digests))


class _Yields:
    """What a function yields, round by round."""

    def __init__(
        self, name: str, function: Callable[[], Iterable[Mapping[str, Any]]], inputs: Sequence[Tensor]
    ) -> None:
        self.name, self.function, self.inputs = name, function, inputs

    def round(self) -> Iterator[Feeds]:
        """Each sample as it comes. Raises LlmcError for what the function raises, and what does not fit."""
        for number, value in enumerate(self._values(), 1):
            origin = f"{self.name}, sample {number}"
            if not isinstance(value, Mapping):
                raise LlmcError(f"{origin} is {type(value).__name__}: yield dicts, input name → array")
            arrays = {str(name): _array(array, f"{origin}: '{name}'") for name, array in value.items()}
            yield fit(arrays, self.inputs, origin)

    def _values(self) -> Iterator[Any]:
        try:
            yield from self.function()
        except Exception as error:  # whatever the user's code raises
            raise LlmcError(f"{self.name} failed: {told(error)}") from error

    def same(self, digests: Sequence[str]) -> Iterator[Feeds]:
        """A round that gives again what the first one gave."""
        number = 0
        for number, (digest, feeds) in enumerate(zip(digests, self.round(), strict=False), 1):
            if _digest(feeds) != digest:
                raise LlmcError(
                    f"{self.name}, sample {number} is not what it was before: the function must yield the same each "
                    "time that it is called (seed what is random)"
                )
            yield feeds
        if number < len(digests):
            raise LlmcError(f"{self.name} yielded {len(digests)} samples, and called again {number}")


def _array(value: Any, where: str) -> Array:
    array = np.asarray(value)
    if array.dtype.kind == "O":
        raise LlmcError(f"{where} is {type(value).__name__}, no array of numbers")
    return array


def _digest(feeds: Feeds) -> str:
    content = hashlib.sha256()
    for name, array in sorted(feeds.items()):
        content.update(f"{name} {array.dtype} {array.shape}\n".encode())
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()
