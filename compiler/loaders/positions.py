"""How many positions a model has, and what scaling of rotary embeddings one graph can hold."""

from __future__ import annotations

from typing import Any

from llmc.compiler.errors import LlmcError


def longest_sequence(model: Any, config: Any) -> int | None:
    """The most positions that the model has; RoBERTa's kind keeps the first ones of its table for padding."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        table = name.endswith("position_embeddings") and getattr(module, "num_embeddings", None) == limit
        if table and module.padding_idx is not None:
            return int(limit - module.padding_idx - 1)
    return limit


def check_rope(config: Any) -> None:
    """Raises LlmcError for rotary embeddings whose frequencies are computed anew as a text gets longer."""
    if any(rope["rope_type"] == "dynamic" for rope in _ropes(config)):
        longest = config.max_position_embeddings
        raise LlmcError(
            f"RoPE scaling 'dynamic' of {type(config).__name__} computes its frequencies anew past {longest} tokens, "
            f"which one graph cannot: for up to {longest} tokens, set rope_type to 'default' in config.json; "
            "for more, give a model that was tuned with 'yarn' or 'linear'"
        )


def longest_cache(config: Any) -> int | None:
    """Tokens after which keys in a cache are no longer what transformers' `generate` has; None: there is no end.

    LongRoPE has other frequencies for long texts, and where one becomes long, its cache is computed anew.
    """
    lengths = [
        rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for rope in _ropes(config)
        if rope["rope_type"] == "longrope"
    ]
    return min((length for length in lengths if length), default=None)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings of a model: one for all layers, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [rope for rope in (found, *found.values()) if isinstance(rope, dict) and "rope_type" in rope]
