"""Hugging Face folders, read without torch: which files count, and why some checkpoints cannot be taken."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.onnx_file import LFS_POINTER

Json = TypeVar("Json", dict[str, Any], list[Any])

Settings = dict[str, Any]
"""A JSON object, as a checkpoint's configuration files hold."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Checkpoint:
    """A transformers model on disk: its configuration and its safetensors weights."""

    folder: Path
    config: Settings
    weights: tuple[Path, ...]
    """The .safetensors files, and the index that lists them where there are several."""
    dtype: Literal["float32", "float16"]
    """What the weights are read as: as they are stored where the CPU can run that, else float32."""
    stored: tuple[str, ...]
    """The floating-point types in the files, as safetensors names them ('F32', 'BF16')."""

    @property
    def encoder_decoder(self) -> bool:
        """Whether it makes two graphs."""
        return bool(self.config.get("is_encoder_decoder"))

    @property
    def architecture(self) -> str | None:
        """The transformers class that the checkpoint was saved from."""
        match self.config.get("architectures"):
            case [str(name), *_]:
                return name
        return None


def read_config(folder: Path) -> Settings:
    """`config.json` of a checkpoint that can be loaded. Raises LlmcError with the reason for one that cannot."""
    if (folder / "adapter_config.json").is_file():
        raise LlmcError(
            f"{folder} is a PEFT adapter, not a model: merge it into its base model first "
            "(peft: model.merge_and_unload(), then save_pretrained)"
        )
    if (folder / "model_index.json").is_file():
        raise LlmcError(f"{folder} is a diffusers pipeline: export the part you want to ONNX, and give that file")
    if not (folder / "config.json").is_file():
        raise LlmcError(f"{folder} has no config.json, so nothing says what model its weights are for")
    config = read_json(folder / "config.json", dict)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise LlmcError(f"{folder} is quantized already ({method}): give the model that it was quantized from")
    return config


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find the folder's configuration and weights. Raises LlmcError where they are missing, damaged or refused."""
    config = read_config(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    else:
        raise LlmcError(_why_no_weights(folder))
    dtypes = sorted({dtype for file in files for dtype in _stored_dtypes(file)})
    return Checkpoint(
        folder=folder,
        config=config,
        weights=tuple(files if len(files) == 1 and not index.is_file() else [index, *files]),
        dtype="float16" if dtypes == ["F16"] else "float32",
        stored=tuple(dtypes),
    )


def read_json(path: Path, kind: type[Json]) -> Json:
    """A configuration file. Raises LlmcError where it is not JSON, or not an object or list as asked for."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LlmcError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, kind):
        raise LlmcError(f"{path} is not a JSON {'object' if kind is dict else 'list'}")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json(index, dict).get("weight_map")
    if not isinstance(names, dict) or not names or any("/" in str(name) for name in names.values()):
        raise LlmcError(f"{index} does not say which files hold the weights ('weight_map' of plain file names)")
    return names


def _why_no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} has its weights as pickles only ({', '.join(pickles)}), which can run any code when they are "
            "read: convert them where you trust them (transformers: save_pretrained writes .safetensors)"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f"; it has: {', '.join(others)}" if others else ""
    return f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json{found}"


def _stored_dtypes(path: Path) -> set[str]:
    """Floating-point types in a .safetensors file, read from its header once its size is found right.

    The format (safetensors README): 8 bytes of header length, a JSON header with each tensor's dtype and data_offsets,
    then the data.
    """
    if not path.is_file():
        raise LlmcError(f"{path} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if LFS_POINTER.startswith(start) and start:
            raise LlmcError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` where it came from")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            raise LlmcError(f"{path} is truncated, or not a .safetensors file")
        try:
            header = json.loads(file.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((entry["data_offsets"][1] for entry in tensors), default=0)
            dtypes = {entry["dtype"] for entry in tensors}
        except (ValueError, AttributeError, TypeError, LookupError) as error:
            raise LlmcError(f"{path} is not a .safetensors file: its header cannot be read") from error
    if 8 + length + end > size:
        raise LlmcError(f"{path} is truncated: it has {size} bytes of {8 + length + end}")
    return {dtype for dtype in dtypes if "F" in dtype}
