"""What transformers' own `generate` makes of prompts: tokens that the loop around a decoder's graph must make too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from llmc.compiler.data import random_feeds
from llmc.compiler.errors import LlmcError
from llmc.compiler.generation.choosing import greedy
from llmc.compiler.generation.decoder import Decoder, Input, pad_left
from llmc.compiler.generation.encoder_decoder import handed_on
from llmc.compiler.loaders import Feeds
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.loaders.signature import Signature, run_torch
from llmc.compiler.session import Session
from llmc.passes.graph import Array, Graph

TOKENS = 16
"""Generated greedily, by torch and by the graph of a decoder with a cache, to compare."""
FEW = 4
"""As many of a model of more than `MUCH`: each reads all of its weights from disk. The cache grows three times."""
MUCH = 8 << 30
"""Bytes of parameters."""
PROMPTS = (9, 6)
"""Tokens of the prompts, the shorter one padded."""


@dataclass(frozen=True)
class Generated:
    """What transformers' `generate` makes of two prompts."""

    ids: Array
    mask: Array
    tokens: Array
    """[2, TOKENS or FEW]: those behind `ids`."""
    given: Feeds = field(default_factory=dict)
    """What an encoder has made of the prompts, for each run of the decoder."""


def generated(model: Any, signature: Signature) -> Generated | None:
    """Greedily, of random prompts. None for a float16 model: rounding may turn the order of its best two tokens."""
    import torch

    if model.dtype != torch.float32:
        return None
    if signature.encoder is not None:
        return _from_encoder(model, signature, signature.encoder)
    rng = np.random.default_rng(0)
    ids, mask = pad_left([rng.integers(0, signature.bounds["input_ids"], length).tolist() for length in PROMPTS])
    tokens = _generate(model, {"input_ids": ids, "attention_mask": mask}, {})
    return Generated(ids, mask, tokens[:, ids.shape[1] :])


def _from_encoder(model: Any, signature: Signature, encoder: Signature) -> Generated:
    """The decoder's first token is always the same one; the prompts are what the encoder reads."""
    sizes = {**dict.fromkeys(encoder.sample, max(PROMPTS)), "batch": len(PROMPTS)}
    feeds = random_feeds(encoder.inputs, sizes, encoder.bounds, np.random.default_rng(0))
    first = getattr(model.config, "decoder_start_token_id", None) or 0
    ids = np.full((len(PROMPTS), 1), first, np.int64)
    tokens = _generate(model, {**feeds, "decoder_input_ids": ids}, {"decoder_start_token_id": first})
    taken = {variable.name for variable in signature.inputs}
    return Generated(ids, np.ones_like(ids), tokens[:, 1:], handed_on(feeds, run_torch(model, encoder, feeds), taken))


def _generate(model: Any, feeds: Feeds, settings: Mapping[str, Any]) -> Array:
    import torch
    from transformers.generation import GenerationMixin

    with quiet(), torch.inference_mode(), _plain_generation(model, settings):
        # the method that all share: Whisper's own cuts sound into pieces first
        found = GenerationMixin.generate(model, **{name: torch.from_numpy(value) for name, value in feeds.items()})
    tokens: Array = found.numpy()
    return tokens


@contextmanager
def _plain_generation(model: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Greedy, of few tokens: what else the checkpoint asks for (beams, forbidden tokens, an end) is left out."""
    from transformers import GenerationConfig

    before = model.generation_config
    large = sum(parameter.nbytes for parameter in model.parameters()) > MUCH
    count = FEW if large else TOKENS
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0, **settings)
    try:
        yield
    finally:
        model.generation_config = before


def prove_tokens(graph: Graph, session: Session, answers: Generated) -> None:
    """The loop around the graph gives the tokens of transformers' own: the cache, positions and masks are right."""
    inputs = [Input(tensor.name, np.dtype(tensor.dtype), tuple(tensor.shape)) for tensor in graph.inputs]
    decoder = Decoder(inputs, session.outputs, session.run)
    stream = decoder.generate(answers.ids, answers.mask, greedy, answers.given)
    count = answers.tokens.shape[1]
    found = np.stack(list(islice(stream, count)), axis=1)
    if not np.array_equal(found, answers.tokens):
        first = int((found != answers.tokens).any(axis=0).argmax())
        raise LlmcError(f"of {count} greedy tokens, number {first + 1} differs from what transformers generates")
