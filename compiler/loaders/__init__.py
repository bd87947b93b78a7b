"""Sources become Graphs here: `load` takes whatever a user has and picks the loader."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmc.compiler.cache.memory import NOTHING, Memory
from llmc.compiler.errors import LlmcError
from llmc.compiler.progress import Progress, quiet
from llmc.passes.graph import Array, Graph

Feeds = Mapping[str, Array]
"""Input name → value, of one run."""

Cache = Literal["growing", "none"]
"""Whether a decoder takes and gives the keys and values of earlier tokens."""

Half = Literal["encoder", "decoder"]
"""Which graph of an encoder-decoder."""
HALVES: tuple[Half, ...] = ("encoder", "decoder")
"""In the order in which they run."""

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?")
"""A model on the Hugging Face hub: 'name' or 'owner/name', and '@revision' to pin it."""


@dataclass
class Loaded:
    """A source that has become a Graph, with what only the source knows."""

    graph: Graph
    kind: Literal["huggingface", "onnx"]
    name: str
    """Folder or file name, without its path; or the name on the hub."""
    digest: str
    """SHA-256 over the source's files."""
    files: Mapping[Path, str] = field(default_factory=dict)
    """Each of these, and others that weights may stand in → its SHA-256."""
    task: str | None = None
    exporter: str = ""
    """How the graph came about ('torch.onnx dynamo, opset 23, sdpa'); '' for an ONNX file."""
    half: Half | None = None
    """Which graph of an encoder-decoder it is."""
    elsewhere: frozenset[str] = frozenset()
    """Symbolic dimensions that the other graph has."""
    limits: dict[str, int] = field(default_factory=dict)
    """The largest size that the model itself allows for a symbolic dimension ({'sequence': 512})."""
    least: dict[str, int] = field(default_factory=dict)
    """The smallest one, where that is more than 1 ({'samples': 400})."""
    vocabulary: int | None = None
    """Number of token ids; generated token inputs stay below it."""
    tokenizer: Path | None = None
    """The folder that holds the model's tokenizer."""
    processor: Path | None = None
    """The folder that says how the model's images are prepared."""
    reference: Callable[[Feeds], dict[str, Array]] | None = None
    """Runs the source model itself (torch) on one set of inputs; what the graph is proved against."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about how it was loaded."""
    cached: bool = False
    """Whether it was found in the cache, not exported."""


def load(
    source: str,
    *,
    task: str | None = None,
    opset: int | None = None,
    cache: Cache = "growing",
    half: Half | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
    memory: Memory = NOTHING,
    progress: Progress = quiet,
) -> Loaded:
    """Load an ONNX file, a folder with `model.onnx`, a Hugging Face or sentence-transformers folder, or a hub id.

    `task` and `opset` say what a Hugging Face model is exported as and at (by default what its configuration
    and the exporter's state call for), `cache` whether a decoder takes and gives the keys and values of earlier
    tokens, `half` which graph of an encoder-decoder is wanted: TwoGraphsError where nothing says so. `offline` uses
    only what the hub's cache holds, as HF_HUB_OFFLINE does; `memory` may know the export.
    Raises LlmcError with the reason for everything that cannot be loaded.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = _model_in(path)
    elif path.is_file():
        path = _model_at(path)
    elif not HUB_ID.fullmatch(source) or path.suffix in (".onnx", *_REFUSED):
        raise LlmcError(f"'{source}' does not exist")
    if path.is_file():
        from llmc.compiler.loaders.onnx_file import load_onnx

        return load_onnx(path, task=task, opset=opset, progress=progress)
    from llmc.compiler.loaders.huggingface import load_huggingface

    fetched = not path.is_dir()
    if fetched:
        from llmc.compiler.loaders.hub import fetch

        progress(f"fetching {source}")
        path = fetch(source, offline=offline)
    loaded = load_huggingface(
        path,
        task=task,
        opset=opset,
        cache=cache,
        half=half,
        trust_remote_code=trust_remote_code,
        memory=memory,
        progress=progress,
    )
    if fetched:
        loaded.name = source
        loaded.notes.append(f"{source} was read at revision {path.name}")
    return loaded


_PICKLE = "is a pickle, which can run any code when it is read; save the model as .safetensors and give its folder"
_REFUSED = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"), _PICKLE),
    ".safetensors": "holds weights only; give the folder that also holds its config.json",
    ".gguf": "is a GGUF file, whose weights are quantized for llama.cpp; give the model that it was made from",
    ".ort": "is ONNX Runtime's own format; give the .onnx file that it was made from",
    **dict.fromkeys((".engine", ".plan"), "is a TensorRT engine already; `llmc inspect` shows what is in it"),
    **dict.fromkeys((".h5", ".keras", ".pb", ".tflite"), "is a TensorFlow model; convert it to ONNX with tf2onnx"),
}


def _model_at(path: Path) -> Path:
    """The file itself, or the folder that it is the weights of."""
    if path.name == "model.safetensors" and (path.parent / "config.json").is_file():
        return path.parent
    if path.suffix in _REFUSED:
        raise LlmcError(f"{path}: {_REFUSED[path.suffix]}")
    return path


def _model_in(folder: Path) -> Path:
    """The folder's ONNX file, or the folder itself where it holds a checkpoint."""
    model = folder / "model.onnx"
    if model.is_file() and not any(folder.glob("*.safetensors")):
        return model
    if any((folder / name).is_file() for name in _CHECKPOINT_FILES):
        return folder
    others = sorted(path.name for path in folder.glob("*.onnx"))
    if others:
        raise LlmcError(f"{folder} has no model.onnx; give one of its files: {', '.join(others)}")
    weights = sorted(path for path in folder.iterdir() if path.suffix in _REFUSED)
    if weights:
        raise LlmcError(f"{weights[0]}: {_REFUSED[weights[0].suffix]}")
    raise LlmcError(f"{folder} holds no model: neither model.onnx nor config.json with .safetensors weights")


_CHECKPOINT_FILES = ("config.json", "modules.json", "adapter_config.json", "model_index.json")
