"""Versions of everything that had a say in an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

ALWAYS = ("llmc-compiler", "ml-dtypes", "numpy", "onnx", "onnxruntime")
HUGGINGFACE = ("onnx-ir", "onnxscript", "tokenizers", "torch", "transformers")


def llmc_version() -> str:
    """Of llmc itself."""
    return metadata.version("llmc-compiler")


def collect(kind: str, target: Mapping[str, str]) -> dict[str, str]:
    """Package → version: what every compile uses, what the loader of `kind` uses, and what the target says."""
    names = (*ALWAYS, *(HUGGINGFACE if kind == "huggingface" else ()))
    return {name: metadata.version(name) for name in sorted(names)} | dict(sorted(target.items()))
