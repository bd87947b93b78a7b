"""Sources become Graphs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmc.passes.graph import Array, Graph

Feeds = Mapping[str, Array]
"""Input name → value, of one run."""


@dataclass
class Loaded:
    """A source that has become a Graph, with what only the source knows."""

    graph: Graph
    kind: Literal["huggingface", "onnx"]
    name: str
    """Folder or file name, without its path."""
    digest: str
    """SHA-256 over the source's files."""
    task: str | None = None
    exporter: str = ""
    """How the graph came about ('torch.onnx dynamo, opset 23, sdpa'); '' for an ONNX file."""
    limits: dict[str, int] = field(default_factory=dict)
    """The largest size that the model itself allows for a symbolic dimension ({'sequence': 512})."""
    vocabulary: int | None = None
    """Number of token ids; generated token inputs stay below it."""
    tokenizer: Path | None = None
    """The folder that holds the model's tokenizer."""
    reference: Callable[[Feeds], dict[str, Array]] | None = None
    """Runs the source model itself (torch) on one set of inputs; what the graph is proved against."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about how it was loaded."""
