"""Runs an encoder-decoder: the encoder once for each prompt, the decoder token by token with what the encoder gave."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.compiler.generation.choosing import Choose
from llmc.compiler.generation.decoder import Decoder, Run, as_past
from llmc.compiler.generation.opening import Opening
from llmc.passes.graph import Array

MASK = "encoder_attention_mask"


class EncoderDecoder:
    """Two graphs, as llmc's loader makes them: `present.N.encoder.key` of the one is `past_key_values.N.encoder.key`
    of the other."""

    def __init__(self, encode: Run, decoder: Decoder, opening: Opening) -> None:
        self._encode, self._decoder, self._opening = encode, decoder, opening

    def generate(self, prompts: Mapping[str, Array], choose: Choose) -> Iterator[Array]:
        """Token after token of each prompt's answer, [batch], without end; `prompts` are the encoder's inputs.

        Shorter texts are padded on the right, where `attention_mask` is 0.
        """
        given = self._given(prompts)
        ids = self._opened(len(next(iter(prompts.values()))), given)
        return self._decoder.generate(ids, np.ones_like(ids), choose, given)

    def logits(self, prompts: Mapping[str, Array], ids: Array) -> Array:
        """[batch, length] token ids of answers, start token and all → [batch, length, vocabulary]."""
        return self._decoder.logits(ids, given=self._given(prompts))

    def _given(self, prompts: Mapping[str, Array]) -> dict[str, Any]:
        return handed_on(prompts, self._encode(prompts), self._decoder.takes)

    def _opened(self, batch: int, given: Mapping[str, Any]) -> Array:
        """What each answer begins with, [batch, tokens]."""
        ids = np.empty((batch, 0), np.int64)
        for token in self._opening:
            column = np.full((batch, 1), token) if isinstance(token, int) else self._likeliest(ids, token, given)
            ids = np.concatenate([ids, column], axis=1)
        return ids

    def _likeliest(self, ids: Array, among: Collection[int], given: Mapping[str, Any]) -> Array:
        """The likeliest token behind `ids` of some, [batch, 1]."""
        tokens = np.array(sorted(among), np.int64)
        logits = self._decoder.logits(ids, given=given)[:, -1]
        found: Array = tokens[logits[:, tokens].argmax(axis=-1)][:, None]
        return found


def handed_on(prompts: Mapping[str, Array], made: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """What a decoder that has the inputs `taken` needs of what its encoder was given, and made."""
    given = as_past(made)
    if "attention_mask" in prompts:
        given[MASK] = prompts["attention_mask"]
    return {name: value for name, value in given.items() if name in taken}


def pad_right(prompts: Sequence[Sequence[int]], pad: int = 0) -> dict[str, Array]:
    """Prompts of different lengths as an encoder takes them: input_ids and attention_mask, int64 [batch, longest]."""
    longest = max(map(len, prompts))
    ids = [[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts]
    mask = [[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
    return {"input_ids": np.array(ids, np.int64), "attention_mask": np.array(mask, np.int64)}
