"""Runs a decoder graph token by token: the prompt at once, then each new token with the cache of those before it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from llmc.compiler.errors import LlmcError
from llmc.compiler.generation.choosing import Choose
from llmc.passes.graph import Array

Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Input name → value in, output name → value out. Values of the cache go from one run to the next as they are."""
LOGITS = "logits"
LONGEST = "llmc.longest"
"""Key of a graph's metadata: how many tokens, prompt and answer together, it is right for; without it, any number."""
_PAST = re.compile(r"past_key_values\.(\d+(?:\.decoder)?\.(?:key|value))")
"""A growing cache: of a decoder that stands alone, or of one beside an encoder, whose cache does not grow."""
_PRESENT, _GIVEN = "present.", "past_key_values."


@dataclass(frozen=True)
class Input:
    """One input of a graph."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Decoder:
    """A graph with a growing cache: `past_key_values.N.key` in, `present.N.key` out, as optimum and llmc name them.

    Raises LlmcError for a graph that is none.
    """

    def __init__(self, inputs: Sequence[Input], outputs: Sequence[str], run: Run, longest: int | None = None) -> None:
        self._longest = longest
        self._inputs = {given.name: given for given in inputs}
        self._past = {name: f"{_PRESENT}{match[1]}" for name in self._inputs if (match := _PAST.fullmatch(name))}
        self._run = run
        missing = [name for name in ("input_ids", "attention_mask") if name not in self._inputs]
        missing += [name for name in (LOGITS, *self._past.values()) if name not in outputs]
        if missing or not self._past:
            raise LlmcError(
                f"the graph generates no text: it has no {missing[0] if missing else 'past_key_values.N.key'}; "
                "give a decoder that was compiled with model.cache: growing"
            )

    @property
    def takes(self) -> Collection[str]:
        """Names of its inputs."""
        return self._inputs.keys()

    def logits(self, ids: Array, mask: Array | None = None, given: Mapping[str, Any] = _NOTHING) -> Array:
        """[batch, length] token ids, from the beginning → [batch, length, vocabulary]; `given` as for `generate`."""
        mask = np.ones_like(ids) if mask is None else mask
        return np.asarray(self._run({**self._feeds(ids, mask, self._empty(len(ids))), **given})[LOGITS])

    def generate(self, ids: Array, mask: Array, choose: Choose, given: Mapping[str, Any] = _NOTHING) -> Iterator[Array]:
        """Token after token of each row, [batch], without end.

        `ids` and `mask` are int64 [batch, length]; shorter prompts are padded on the left, where `mask` is 0. `given`
        are inputs that every run takes: what an encoder has made. Raises LlmcError for padding on the right, and for
        more tokens than the graph is right for.
        """
        if not mask[:, -1].all():
            raise LlmcError("a prompt ends in padding: shorter prompts are padded on the left")
        past = self._empty(len(ids))
        while True:
            found = self._run({**self._feeds(ids, mask, past), **given})
            tokens = choose(np.asarray(found[LOGITS])[:, -1].astype(np.float32))
            yield tokens
            past = {name: found[present] for name, present in self._past.items()}
            ids = tokens[:, None]
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)

    def _empty(self, batch: int) -> dict[str, Any]:
        """The cache before the first token."""
        return {name: self._zeros(self._inputs[name], batch) for name in self._past}

    def _zeros(self, given: Input, batch: int) -> Array:
        _, heads, _, width = given.shape
        if not isinstance(heads, int) or not isinstance(width, int):
            raise LlmcError(
                f"input '{given.name}' has the shape {list(given.shape)}, without number and width of heads"
            )
        return np.zeros((batch, heads, 0, width), given.dtype)

    def _feeds(self, ids: Array, mask: Array, past: Mapping[str, Any]) -> dict[str, Any]:
        if self._longest is not None and mask.shape[1] > self._longest:
            raise LlmcError(
                f"{mask.shape[1]} tokens, prompt and answer: the graph is right for {self._longest} at most"
            )
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        taken = {name: value.astype(self._inputs[name].dtype) for name, value in feeds.items() if name in self._inputs}
        return taken | dict(past)


def as_past(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and values that a graph gives, as the next one takes them."""
    return {_GIVEN + name.removeprefix(_PRESENT): value for name, value in outputs.items() if name.startswith(_PRESENT)}


def pad_left(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Array, Array]:
    """Prompts of different lengths as (ids, mask), both int64 [batch, longest]."""
    longest = max(map(len, prompts))
    ids = np.array([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], dtype=np.int64)
    mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], dtype=np.int64)
    return ids, mask
