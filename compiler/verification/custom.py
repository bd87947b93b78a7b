"""Metrics of the user's own, by import path."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llmc.compiler.errors import LlmcError
from llmc.compiler.recipe.sections import CustomMetric
from llmc.compiler.verification.metrics import Custom


def load_custom(metrics: Mapping[str, CustomMetric], folder: Path) -> Custom:
    """The functions; their modules are looked for in `folder` and the working directory too. Raises LlmcError."""
    found = {}
    for name, metric in metrics.items():
        module, _, function = metric.function.partition(":")
        try:
            with _path(folder):
                found[name] = getattr(importlib.import_module(module), function)
        except Exception as error:
            raise LlmcError(
                f"verify.custom.{name}: '{metric.function}' cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not callable(found[name]):
            raise LlmcError(f"verify.custom.{name}: '{metric.function}' is no function")
    return found


def custom_digest(custom: Custom) -> list[str]:
    """Of the files that the functions stand in: what was measured with another version is not found again."""
    digests = []
    for name, function in sorted(custom.items()):
        file = getattr(sys.modules.get(getattr(function, "__module__", "")), "__file__", None)
        content = Path(file).read_bytes() if file else b""
        digests.append(f"{name} {hashlib.sha256(content).hexdigest()}")
    return digests


@contextmanager
def _path(folder: Path) -> Iterator[None]:
    """Python's search path with `folder` and the working directory in front."""
    before = list(sys.path)
    sys.path[:0] = [str(folder), str(Path.cwd())]
    try:
        yield
    finally:
        sys.path[:] = before
