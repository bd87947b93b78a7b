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
from llmc.compiler.loaders.tasks import IMAGE_TEXT, TASKS, TEXT_GENERATION
from llmc.passes.graph import Array, Variable

Sizes = dict[str, int]

MAIN_INPUTS = ("input_ids", "pixel_values", "pixel_values_videos", "input_values", "input_features", "audio_values")
"""What transformers models call the tensors that carry text, images, video and sound."""

SAMPLES = "samples"
"""Symbolic dimension: of sound, at the rate that the model was trained with."""

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
    least: dict[str, int] = field(default_factory=dict)
    """Symbolic dimension → the smallest size that the model takes, where that is more than 1."""
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
    if kinds == ["input_ids", "pixel_values"] and task == IMAGE_TEXT:
        return _image_text_signature(model, folder)
    if kinds == ["input_values"] and hasattr(model.config, "conv_kernel"):
        return _sound_signature(model, task)
    found = " and ".join(kinds) or "none of the usual inputs"
    raise LlmcError(
        f"{type(model).__name__} takes {found}: llmc exports models that take text (input_ids), images (pixel_values), "
        "both to compare them (CLIP), or sound as samples (input_values, wav2vec2)"
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
    pictures, notes = _pictures(model, model.config, folder, "batch")
    fields = TASKS[task].outputs
    return Signature(
        inputs=(pictures,),
        outputs=fields,
        call=_plain_call(model, fields),
        sample={"batch": 2},
        checks=({"batch": 1}, {"batch": 3}),
        notes=notes,
    )


def _image_text_signature(model: Any, folder: Path) -> Signature:
    """Pictures and texts, as many of each as there are, and how well each picture goes with each text."""
    config = model.config.get_text_config()
    pictures, notes = _pictures(model, model.config.vision_config, folder, "image_batch")
    limit = longest_sequence(model, config)
    fields = TASKS[IMAGE_TEXT].outputs
    sizes = (
        {"image_batch": 2, "text_batch": 3},
        {"image_batch": 1, "text_batch": 2},
        {"image_batch": 3, "text_batch": 1},
    )
    lengths = (min(length, limit or length) for length in (7, 5, 11))
    sample, *checks = ({**size, "sequence": length} for size, length in zip(sizes, lengths, strict=True))
    texts = (
        Variable(name, dtype=np.int64, shape=["text_batch", "sequence"]) for name in ("input_ids", "attention_mask")
    )
    return Signature(
        inputs=(pictures, *texts),
        outputs=fields,
        call=_plain_call(model, fields),
        sample=sample,
        checks=tuple(checks),
        bounds={"input_ids": config.vocab_size},
        limits={"sequence": limit} if limit else {},
        notes=notes,
    )


def _pictures(model: Any, config: Any, folder: Path, batch: str) -> tuple[Variable, tuple[str, ...]]:
    """The input that takes pictures, and what is to be said of their size."""
    size = _image_size(config, folder)
    shape = [batch, getattr(config, "num_channels", 3), *(size or (IMAGE_SIZE, IMAGE_SIZE))]
    note = f"the configuration gives no image size: exported for {IMAGE_SIZE} x {IMAGE_SIZE} pixels"
    return Variable("pixel_values", dtype=_dtype(model), shape=shape), () if size else (note,)


def _sound_signature(model: Any, task: str) -> Signature:
    """Sound as its samples, which convolutions make frames of: fewer samples than one frame takes make none.

    Models whose first convolution is normalized over the whole sound (`feat_extract_norm: group`) were trained without
    a mask, on sounds padded with zeros; the others take one.
    """
    fields, config = TASKS[task].outputs, model.config
    masked = config.feat_extract_norm == "layer"
    masks = [Variable("attention_mask", dtype=np.int64, shape=["batch", SAMPLES])] if masked else []
    return Signature(
        inputs=(Variable("input_values", dtype=_dtype(model), shape=["batch", SAMPLES]), *masks),
        outputs=fields,
        call=_plain_call(model, fields),
        sample={"batch": 2, SAMPLES: _samples_of(config, 7)},
        checks=({"batch": 1, SAMPLES: _samples_of(config, 1)}, {"batch": 3, SAMPLES: _samples_of(config, 11) + 3}),
        least={SAMPLES: _samples_of(config, 1)},
    )


def _samples_of(config: Any, frames: int) -> int:
    """The fewest samples that the convolutions of a model make so many frames of."""
    samples = frames
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return int(samples)


def _plain_call(model: Any, fields: tuple[str, ...]) -> Callable[..., tuple[Any, ...]]:
    """The model's own forward, on inputs of its own names."""

    def call(forward: Callable[..., Any], **inputs: Any) -> tuple[Any, ...]:
        return _outputs(model, forward(**inputs, return_dict=True), fields)

    return call


def _dtype(model: Any) -> np.dtype[Any]:
    return np.dtype(str(model.dtype).removeprefix("torch."))


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
