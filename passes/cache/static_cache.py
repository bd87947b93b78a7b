"""What a graph with a static cache says of itself, and how it is run on what the growing form takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmc.passes.errors import LlmcError
from llmc.passes.graph import Array, Graph

KEY = "llmc.static_cache"
"""Of the model's metadata: a StaticCache as JSON."""
AXIS = 2
"""Of the tokens in a cache [batch, heads, tokens, size]."""


class StaticCache(BaseModel):
    """The caches of a graph that holds them at a fixed length, which `scatter-kv-cache` makes of growing ones."""

    model_config = ConfigDict(frozen=True)

    length: int
    """Tokens that each cache has room for."""
    past_length: str
    """The input, int64 [], that says how many of them are there already."""
    mask: str | None
    """The input [batch, length] that marks tokens to attend to, where there is one."""
    tokens: tuple[str, int]
    """An input and its axis along which the new tokens stand."""
    caches: dict[str, str]
    """Input → output, [batch, heads, length, size] both."""

    @classmethod
    def of(cls, graph: Graph) -> StaticCache | None:
        """What the graph says; None where its caches are not static."""
        text = graph.metadata.get(KEY)
        return None if text is None else cls.model_validate_json(text)

    def write(self, graph: Graph) -> None:
        """Say it of a graph."""
        graph.metadata[KEY] = self.model_dump_json()

    def takes(self, feeds: Mapping[str, Array]) -> bool:
        """Whether these are inputs of the growing form: caches as long as they are full, and no length beside them."""
        return self.past_length not in feeds and all(name in feeds for name in self.caches)

    def feeds(self, feeds: Mapping[str, Array], types: Mapping[str, Any]) -> dict[str, Array]:
        """Inputs of the growing form as inputs of the static one, whose caches may be of another of the `types`.

        Raises LlmcError where the cache is too short.
        """
        total = self._total(feeds)
        if total > self.length:
            raise LlmcError(
                f"{total} tokens do not fit into the static cache of {self.length}: raise `length` of scatter-kv-cache "
                "or make the dimensions of past and new tokens smaller (model.dimensions)"
            )
        padded = {name: _padded(feeds[name], AXIS, self.length).astype(types[name]) for name in self.caches}
        if self.mask is not None:
            padded[self.mask] = _padded(feeds[self.mask], -1, self.length)
        return {**feeds, **padded, self.past_length: np.array(self._past(feeds), np.int64)}

    def outputs(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of the static form, run on `feeds` of the growing one, as outputs of the growing form."""
        total, presents = self._total(feeds), set(self.caches.values())
        return {
            name: value[:, :, :total] if name in presents else value  # along AXIS
            for name, value in outputs.items()
        }

    def _past(self, feeds: Mapping[str, Array]) -> int:
        return int(feeds[next(iter(self.caches))].shape[AXIS])

    def _total(self, feeds: Mapping[str, Array]) -> int:
        name, axis = self.tokens
        return self._past(feeds) + int(feeds[name].shape[axis])


def _padded(value: Array, axis: int, length: int) -> Array:
    """With zeros behind it up to `length` along `axis`."""
    widths = [(0, 0)] * value.ndim
    widths[axis] = (0, length - value.shape[axis])
    return np.pad(value, widths)
