"""Encoder-decoders as two graphs: what the encoder gives is all that the decoder needs to know of the prompt.

The encoder gives the keys and values that each layer of the decoder attends to, computed once: `present.N.encoder.key`
and `.value` [batch, heads, encoder_sequence, width]. The decoder takes them in every run as they are, under the names
that optimum's users know, `past_key_values.N.encoder.key`, beside its own cache, `past_key_values.N.decoder.key`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmc.compiler.errors import LlmcError
from llmc.compiler.generation.decoder import LOGITS
from llmc.compiler.loaders.key_values import PARTS, PAST, cache_outputs, layer_inputs, past_cache, present_values
from llmc.compiler.loaders.positions import longest_sequence
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.loaders.signature import Signature
from llmc.passes.graph import Variable

SOURCE = "encoder_sequence"
"""Symbolic dimension: tokens that the encoder reads."""
DIMENSIONS = frozenset({"batch", SOURCE, "sequence", PAST})
"""Of either graph."""
OWN, CROSS = ".decoder", ".encoder"
"""In names of the cache: of the decoder's own tokens, and of the encoder's."""
_FIRST = 3
"""Tokens that caches are looked at with: of the encoder, one more than of the decoder."""


def encoder_signature(model: Any) -> Signature:
    """Text, or sound, to the hidden states of its tokens and each decoder layer's keys and values of them."""
    inputs, sizes = _source(model)
    _, cross = _caches(model)
    text = inputs[0].name == "input_ids"

    def call(forward: Callable[..., Any], **given: Any) -> tuple[Any, ...]:
        first = next(iter(given.values())).new_zeros((next(iter(given.values())).shape[0], 1)).long()
        found = forward(**given, decoder_input_ids=first, use_cache=True, return_dict=True)
        return (found["encoder_last_hidden_state"], *present_values(found["past_key_values"].cross_attention_cache))

    limit = longest_sequence(model, model.config) if text else None
    return Signature(
        inputs=inputs,
        outputs=("last_hidden_state", *cache_outputs(len(cross) // len(PARTS), CROSS)),
        call=call,
        sample={"batch": 2, **dict.fromkeys(sizes, 7)},
        checks=({"batch": 1, **dict.fromkeys(sizes, 5)}, {"batch": 3, **dict.fromkeys(sizes, 11)}),
        bounds={"input_ids": model.config.vocab_size} if text else {},
        limits={SOURCE: limit} if limit else {},
    )


def decoder_signature(model: Any) -> Signature:
    """The tokens so far and what the encoder made of the prompt, to the logits of the next ones."""
    own, cross = _caches(model)
    layers = len(own) // len(PARTS)
    sizes = [SOURCE] if SOURCE in (cross[0].shape or ()) else []
    total = f"{PAST} + sequence"
    masks = [Variable("encoder_attention_mask", dtype=np.int64, shape=["batch", SOURCE])] if sizes else []

    def call(forward: Callable[..., Any], **inputs: Any) -> tuple[Any, ...]:
        from transformers.cache_utils import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        keys = inputs[cross[0].name]
        # only the size of the encoder's output is asked for, where its keys and values are there
        states = keys.new_zeros((keys.shape[0], keys.shape[2], model.config.hidden_size))
        cache = EncoderDecoderCache(past_cache(inputs, layers, OWN), past_cache(inputs, layers, CROSS))
        cache.is_updated = dict.fromkeys(range(layers), True)
        found = forward(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=inputs.get("encoder_attention_mask"),
            decoder_input_ids=inputs["input_ids"],
            decoder_attention_mask=inputs["attention_mask"],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return (found[LOGITS], *present_values(found["past_key_values"].self_attention_cache))

    limit = getattr(model.config, "max_target_positions", None) or longest_sequence(model, model.config)
    return Signature(
        inputs=(
            Variable("input_ids", dtype=np.int64, shape=["batch", "sequence"]),
            Variable("attention_mask", dtype=np.int64, shape=["batch", total]),
            *masks,
            *own,
            *cross,
        ),
        outputs=(LOGITS, *cache_outputs(layers, OWN)),
        call=call,
        sample={"batch": 2, "sequence": 3, PAST: 5, **dict.fromkeys(sizes, 7)},
        checks=(
            {"batch": 1, "sequence": 7, PAST: 0, **dict.fromkeys(sizes, 5)},
            {"batch": 3, "sequence": 1, PAST: 6, **dict.fromkeys(sizes, 9)},
            {"batch": 2, "sequence": 4, PAST: 3, **dict.fromkeys(sizes, 2)},
        ),
        bounds={"input_ids": model.config.vocab_size},
        limits=dict.fromkeys(("sequence", PAST, total), limit) if limit else {},
        encoder=encoder_signature(model),
    )


def _source(model: Any) -> tuple[tuple[Variable, ...], list[str]]:
    """What the encoder reads, and the symbolic dimensions of it beside the batch."""
    if model.main_input_name == "input_ids":
        names = ("input_ids", "attention_mask")
        return tuple(Variable(name, dtype=np.int64, shape=["batch", SOURCE]) for name in names), [SOURCE]
    if model.config.model_type == "whisper":  # which always hears as many seconds, padded with silence
        dtype = np.dtype(str(model.dtype).removeprefix("torch."))
        frames = model.config.max_source_positions * model.model.encoder.conv1.stride[0]
        frames *= model.model.encoder.conv2.stride[0]
        return (Variable("input_features", dtype=dtype, shape=["batch", model.config.num_mel_bins, frames]),), []
    raise LlmcError(
        f"{type(model).__name__} reads {model.main_input_name}: llmc takes encoder-decoders that read text, and Whisper"
    )


def _caches(model: Any) -> tuple[tuple[Variable, ...], tuple[Variable, ...]]:
    """The decoder's cache of its own tokens, and of the encoder's, found by running the model."""
    import torch

    inputs, sizes = _source(model)
    shape = [1 if size == "batch" else _FIRST if isinstance(size, str) else size for size in inputs[0].shape or ()]
    dtype = torch.int64 if inputs[0].name == "input_ids" else model.dtype
    given = {inputs[0].name: torch.ones(shape, dtype=dtype)}
    with quiet(), torch.inference_mode():
        found = model(**given, decoder_input_ids=torch.ones((1, _FIRST - 1), dtype=torch.int64), use_cache=True)
    cache, kind = found.get("past_key_values"), type(model).__name__
    own = layer_inputs(kind, getattr(cache, "self_attention_cache", None), PAST, _FIRST - 1, OWN)
    read = found["encoder_last_hidden_state"].shape[1]
    cross = layer_inputs(kind, getattr(cache, "cross_attention_cache", None), SOURCE if sizes else read, read, CROSS)
    if not own or len(own) != len(cross):
        raise LlmcError(f"{kind} keeps no cache of keys and values for its decoder and its encoder")
    return own, cross
