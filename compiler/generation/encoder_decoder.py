"""Runs an encoder-decoder: the encoder once for each prompt, the decoder token by token with what the encoder gave."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.compiler.generation.choosing import Choose
from llmc.compiler.generation.decoder import Decoder, Run, as_past
from llmc.passes.graph import Array

MASK = "encoder_attention_mask"


class EncoderDecoder:
    """Two graphs, as llmc's loader makes them: `present.N.encoder.key` of the one is `past_key_values.N.encoder.key`
    of the other."""

    def __init__(self, encode: Run, decoder: Decoder, first: Sequence[int]) -> None:
        """`first` are the tokens that every answer begins with, and that are no part of it."""
        self._encode, self._decoder, self._first = encode, decoder, list(first)

    def generate(self, prompts: Mapping[str, Array], choose: Choose) -> Iterator[Array]:
        """Token after token of each prompt's answer, [batch], without end; `prompts` are the encoder's inputs.

        Shorter texts are padded on the right, where `attention_mask` is 0.
        """
        given = handed_on(prompts, self._encode(prompts), self._decoder.takes)
        batch = len(next(iter(prompts.values())))
        ids = np.tile(np.array([self._first], np.int64), (batch, 1))
        return self._decoder.generate(ids, np.ones_like(ids), choose, given)


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
