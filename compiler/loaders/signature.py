"""What a model takes and gives as a graph: inputs with their symbolic dimensions, outputs, and the call between."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Cache, Feeds
from llmc.compiler.loaders.checkpoint import read_json
from llmc.compiler.loaders.key_values import PARTS, PAST, cache_inputs, cache_outputs, past_cache, present_values
from llmc.compiler.loaders.positions import check_rope, longest_cache, longest_sequence
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.loaders.sentence_transformers import OUTPUTS, Head
from llmc.compiler.loaders.tasks import TASKS, TEXT_GENERATION
from llmc.passes.graph import Array, Variable

Sizes = dict[str, int]

MAIN_INPUTS = ("input_ids", "pixel_values", "pixel_values_videos", "input_values", "input_features", "audio_values")
"""What transformers models call the tensors that carry text, images, video and sound."""

IMAGE_SIZE = 224
"""Pixels a side, where a vision model's configuration does not say (ImageNet's custom)."""


@dataclass(frozen=True)
class Signature:
    """One graph that a torch model is exported as."""

    inputs: tuple[Variable, ...]
    """Names, dtypes and shapes; a dimension that may change is its name."""
    outputs: tuple[str, ...]
    call: Callable[..., tuple[Any, ...]]
    """(the model's own forward, input name → tensor) → the outputs' tensors, in order."""
    sample: Sizes
    """Sizes to export with: 2 or more each, as torch.export takes sizes 0 and 1 for fixed ones."""
    checks: tuple[Sizes, ...]
    """Sizes to compare the graph with torch at: without padding, and with."""
    bounds: dict[str, int] = field(default_factory=dict)
    """Input → what its integers stay below."""
    limits: dict[str, int] = field(default_factory=dict)
    """Symbolic dimension → the largest size that the model takes."""
    notes: tuple[str, ...] = ()
    longest: int | None = None
    """Tokens that a cache may hold, where more of them would not be what transformers makes."""
    encoder: Signature | None = None
    """Of the graph that makes some of the inputs, where this one is the decoder of two."""


def run_torch(model: Any, signature: Signature, feeds: Feeds) -> dict[str, Array]:
    """Run the model itself: input name → array in, output name → array out."""
    import torch

    inputs = {variable.name: torch.tensor(np.asarray(feeds[variable.name])) for variable in signature.inputs}
    with quiet(), torch.inference_mode():
        outputs = signature.call(model.forward, **inputs)
    return {name: value.numpy() for name, value in zip(signature.outputs, outputs, strict=True)}


def signature_of(model: Any, task: str, head: Head | None, folder: Path, cache: Cache = "growing") -> Signature:
    """The signature of a loaded transformers model; `cache` counts for text generation alone.

    Raises LlmcError for kinds of input that llmc does not give.
    """
    kinds = [name for name in MAIN_INPUTS if name in inspect.signature(model.forward).parameters]
    if kinds == ["input_ids"] and task == TEXT_GENERATION and cache == "growing":
        return _cached_signature(model)
    if kinds == ["input_ids"]:
        return _text_signature(model, task, head)
    if kinds == ["pixel_values"]:
        return _image_signature(model, task, folder)
    found = " and ".join(kinds) or "none of the usual inputs"
    raise LlmcError(
        f"{type(model).__name__} takes {found}: llmc exports models that take text (input_ids) or images (pixel_values)"
    )


def _text_signature(model: Any, task: str, head: Head | None) -> Signature:
    config = model.config.get_text_config()
    check_rope(config)
    taken = inspect.signature(model.forward).parameters
    types = getattr(config, "type_vocab_size", 0) or 0
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in taken and types > 1:
        names.append("token_type_ids")
    settings = {"return_dict": True, **({"use_cache": False} if "use_cache" in taken else {})}
    fields = TASKS[task].outputs

    def call(forward: Callable[..., Any], **inputs: Any) -> tuple[Any, ...]:
        found = _outputs(model, forward(**inputs, **settings), fields)
        return found if head is None else (head(found[0], inputs["attention_mask"]),)

    limit = longest_sequence(model, config)
    longest = limit or 11
    return Signature(
        inputs=tuple(Variable(name, dtype=np.int64, shape=["batch", "sequence"]) for name in names),
        outputs=fields if head is None else OUTPUTS,
        call=call,
        sample={"batch": 2, "sequence": min(7, longest)},
        checks=({"batch": 1, "sequence": min(5, longest)}, {"batch": 3, "sequence": min(11, longest)}),
        bounds={"input_ids": config.vocab_size, "token_type_ids": types},
        limits={"sequence": limit} if limit else {},
    )


def _cached_signature(model: Any) -> Signature:
    """A decoder that takes keys and values of earlier tokens, and gives those of all: for prompts and for decoding."""
    config = model.config.get_text_config()
    check_rope(config)
    taken = inspect.signature(model.forward).parameters
    past = cache_inputs(model)
    layers = len(past) // len(PARTS)
    total = f"{PAST} + sequence"
    names = ["input_ids", *(["position_ids"] if "position_ids" in taken else [])]

    def call(forward: Callable[..., Any], **inputs: Any) -> tuple[Any, ...]:
        given = {name: inputs[name] for name in (*names, "attention_mask")}
        found = forward(**given, past_key_values=past_cache(inputs, layers), use_cache=True, return_dict=True)
        return (*_outputs(model, found, TASKS[TEXT_GENERATION].outputs), *present_values(found["past_key_values"]))

    longest = longest_cache(config)
    limit = longest or longest_sequence(model, config)
    note = f"RoPE scaling 'longrope' computes the whole cache anew past {longest} tokens: exported for up to {longest}"
    return Signature(
        inputs=(
            *(Variable(name, dtype=np.int64, shape=["batch", "sequence"]) for name in names),
            Variable("attention_mask", dtype=np.int64, shape=["batch", total]),
            *past,
        ),
        outputs=(*TASKS[TEXT_GENERATION].outputs, *cache_outputs(layers)),
        call=call,
        sample={"batch": 2, "sequence": 3, PAST: 5},
        checks=(
            {"batch": 1, "sequence": 7, PAST: 0},
            {"batch": 3, "sequence": 1, PAST: 6},
            {"batch": 2, "sequence": 4, PAST: 3},
        ),
        bounds={"input_ids": config.vocab_size},
        limits=dict.fromkeys(("sequence", PAST, total), limit) if limit else {},
        notes=(note,) if longest else (),
        longest=longest,
    )


def _image_signature(model: Any, task: str, folder: Path) -> Signature:
    channels = getattr(model.config, "num_channels", 3)
    size = _image_size(model.config, folder)
    height, width = size or (IMAGE_SIZE, IMAGE_SIZE)
    fields = TASKS[task].outputs

    def call(forward: Callable[..., Any], **inputs: Any) -> tuple[Any, ...]:
        return _outputs(model, forward(**inputs, return_dict=True), fields)

    dtype = np.dtype(str(model.dtype).removeprefix("torch."))
    shape = ["batch", channels, height, width]
    note = f"the configuration gives no image size: exported for {IMAGE_SIZE} x {IMAGE_SIZE} pixels"
    return Signature(
        inputs=(Variable("pixel_values", dtype=dtype, shape=shape),),
        outputs=fields,
        call=call,
        sample={"batch": 2},
        checks=({"batch": 1}, {"batch": 3}),
        notes=() if size else (note,),
    )


def _outputs(model: Any, found: Mapping[str, Any], fields: tuple[str, ...]) -> tuple[Any, ...]:
    missing = [name for name in fields if found.get(name) is None]
    if missing:
        raise LlmcError(f"{type(model).__name__} gives no '{missing[0]}', only: {', '.join(found)}")
    return tuple(found[name] for name in fields)


def _image_size(config: Any, folder: Path) -> tuple[int, int] | None:
    """(height, width) from the model's configuration, else from its image processor's."""
    processor = folder / "preprocessor_config.json"
    settings = read_json(processor, dict) if processor.is_file() else {}
    for size in (getattr(config, "image_size", None), settings.get("crop_size"), settings.get("size")):
        match size:
            case int(side) | {"shortest_edge": int(side)}:
                return (side, side)
            case {"height": int(height), "width": int(width)} | [int(height), int(width)]:
                return (height, width)
    return None
