"""What a graph with int8 caches says of itself, and how it is run on inputs of the form with float caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
from pydantic import BaseModel, ConfigDict

from llmc.passes.graph import Array, Graph

KEY = "llmc.int8_cache"
"""Of the model's metadata: an Int8Cache as JSON."""


class Int8Cache(BaseModel):
    """The caches of a graph that holds them as int8, which `quantize-kv-cache` makes of float ones."""

    model_config = ConfigDict(frozen=True)

    caches: dict[str, str]
    """Input → output, int8 [batch, heads, tokens, size] both."""
    scales: dict[str, list[list[float]]]
    """Input → what one level stands for, [heads][1 or size]."""

    @classmethod
    def of(cls, graph: Graph) -> Int8Cache | None:
        """What the graph says; None where none of its caches are int8."""
        text = graph.metadata.get(KEY)
        return None if text is None else cls.model_validate_json(text)

    def write(self, graph: Graph) -> None:
        """Say it of a graph, beside what is said of it already."""
        known = Int8Cache.of(graph)
        caches = {**known.caches, **self.caches} if known else self.caches
        scales = {**known.scales, **self.scales} if known else self.scales
        graph.metadata[KEY] = Int8Cache(caches=caches, scales=scales).model_dump_json()

    def takes(self, feeds: Mapping[str, Array]) -> bool:
        """Whether these are inputs of the float form."""
        return not any(name in feeds and feeds[name].dtype == np.int8 for name in self.caches)

    def feeds(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs of the float form, with the caches in levels."""
        return {
            name: quantized(value, self.scale(name)) if name in self.caches else value for name, value in feeds.items()
        }

    def outputs(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of the int8 form as outputs of the float one: caches as float32."""
        inputs = {present: past for past, present in self.caches.items()}
        return {
            name: value.astype(np.float32) * self.scale(inputs[name]) if name in inputs else value
            for name, value in outputs.items()
        }

    def scale(self, name: str) -> Array:
        """Of the cache that this input is: float32 [heads, 1, 1 or size], which broadcasts with it."""
        return np.array(self.scales[name], np.float32)[:, None, :]


def quantized(values: Array, scale: Array) -> Array:
    """The level nearest to values / scale, int8; ties go to even, as QuantizeLinear's do."""
    return cast(Array, np.clip(np.rint(values.astype(np.float32) / scale), -128, 127).astype(np.int8))
