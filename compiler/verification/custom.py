"""Metrics of the user's own, by import path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmc.compiler.functions import code_of, load_function
from llmc.compiler.recipe.sections import CustomMetric
from llmc.compiler.verification.metrics import Custom


def load_custom(metrics: Mapping[str, CustomMetric], folder: Path) -> Custom:
    """The functions; files and modules are looked for in `folder`. Raises LlmcError."""
    return {name: load_function(metric.function, folder, f"verify.custom.{name}") for name, metric in metrics.items()}


def custom_digest(custom: Custom) -> list[str]:
    """Of the files that the functions stand in: what was measured with another version is not found again."""
    return [f"{name} {code_of(function)}" for name, function in sorted(custom.items())]
