"""Versions of everything that had a say in an artifact."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata

ALWAYS = ("llmc-compiler", "ml-dtypes", "numpy", "onnx", "onnxruntime")
HUGGINGFACE = ("onnx-ir", "onnxscript", "tokenizers", "torch", "transformers")


@cache
def version_of(distribution: str) -> str:
    """The version of an installed distribution, read once. Raises PackageNotFoundError where it is not."""
    return metadata.version(distribution)


def llmc_version() -> str:
    """Of llmc itself."""
    return version_of("llmc-compiler")


def collect(kind: str, target: Mapping[str, str], others: Collection[str] = ()) -> dict[str, str]:
    """Package → version: of what every compile uses, the loader of `kind`, and `others`; and what the target says."""
    names = {*ALWAYS, *(HUGGINGFACE if kind == "huggingface" else ())}
    return {name: version_of(name) for name in sorted(names)} | installed(others) | dict(sorted(target.items()))


def installed(packages: Collection[str]) -> dict[str, str]:
    """Package → version, of those that are installed."""
    found = {}
    for name in sorted(packages):
        with suppress(metadata.PackageNotFoundError):
            found[name] = version_of(name)
    return found
