"""The key-value cache of a decoder as inputs and outputs of its graph: what was attended to before, and what is now.

Names are those that optimum gave them: `past_key_values.N.key` and `.value` in, `present.N.key` and `.value` out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.quiet import quiet
from llmc.passes.graph import Variable

PAST = "past_sequence"
"""Symbolic dimension: tokens in the cache before the run."""
PARTS = ("key", "value")


def cache_inputs(model: Any) -> tuple[Variable, ...]:
    """Keys and values of each layer, [batch, heads, past_sequence, width], found by running the model on two tokens.

    The configuration tells their shapes too, but wrongly for some models. Raises LlmcError for a model whose layers
    keep something else, as state-space models do.
    """
    import torch

    kind = type(model).__name__
    with quiet(), torch.inference_mode():
        found = model(input_ids=torch.ones((1, 2), dtype=torch.int64), use_cache=True).get("past_key_values")
    inputs = layer_inputs(kind, found, PAST, 2)
    if not inputs:
        raise LlmcError(f"{kind} gives no key-value cache: set model.cache to none in the recipe")
    return inputs


def layer_inputs(kind: str, cache: Any, length: int | str, seen: int, side: str = "") -> tuple[Variable, ...]:
    """Inputs that hold what each layer of `cache` holds of `seen` tokens, for `length` of them.

    `side` stands behind the number in their names. Raises LlmcError for layers that keep something else.
    """
    inputs = []
    for number, layer in enumerate(getattr(cache, "layers", ())):
        for part, value in zip(PARTS, (getattr(layer, "keys", None), getattr(layer, "values", None)), strict=True):
            if not _is_of(value, seen):
                raise LlmcError(
                    f"layer {number} of {kind} keeps a state that is not the keys and values of each token: "
                    "set model.cache to none in the recipe"
                )
            assert value is not None
            shape: list[int | str | None] = ["batch", value.shape[1], length, value.shape[3]]
            dtype = np.dtype(str(value.dtype).removeprefix("torch."))
            inputs.append(Variable(f"past_key_values.{number}{side}.{part}", dtype=dtype, shape=shape))
    return tuple(inputs)


def _is_of(value: Any, seen: int) -> bool:
    """Whether it is keys or values of as many tokens, [batch, heads, tokens, width]."""
    return getattr(value, "ndim", 0) == 4 and value.shape[2] == seen


def cache_outputs(layers: int, side: str = "") -> tuple[str, ...]:
    """Names of the outputs that hold the cache after the run, in the order of `present_values`."""
    return tuple(f"present.{number}{side}.{part}" for number in range(layers) for part in PARTS)


def past_cache(inputs: Mapping[str, Any], layers: int, side: str = "") -> Any:
    """A transformers Cache that holds the keys and values in `inputs`, and grows from them."""
    from transformers.cache_utils import Cache, DynamicLayer

    class PastLayer(DynamicLayer):  # type: ignore[misc]
        def __init__(self, number: int) -> None:
            super().__init__()
            self.keys, self.values = (inputs[f"past_key_values.{number}{side}.{part}"] for part in PARTS)
            self.dtype, self.device = self.keys.dtype, self.keys.device
            self.is_initialized = True

        def get_seq_length(self) -> int:
            """Without transformers' test for an empty cache, which would fix the length in an export."""
            return self.keys.shape[-2]  # type: ignore[no-any-return]

    return Cache([PastLayer(number) for number in range(layers)])


def present_values(cache: Any) -> tuple[Any, ...]:
    """Keys and values of each layer, [batch, heads, past + new tokens, width]."""
    return tuple(value for layer in cache.layers for value in (layer.keys, layer.values))
