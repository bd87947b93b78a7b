"""Targets: what an artifact is emitted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from llmc.passes.graph import Graph

TargetKind = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "onnx"]


@dataclass(frozen=True)
class Range:
    """Sizes of one symbolic dimension: the least, the one to optimize for, the largest."""

    min: int
    opt: int
    max: int


Profile = Mapping[str, Range]
"""Symbolic dimension → its sizes: one optimization profile."""


@dataclass(frozen=True)
class BuildRequest:
    """All that a target needs to know beside the graph."""

    profiles: Sequence[Profile]
    compute_capabilities: Sequence[int] = ()
    """SM numbers: 80, 86, 89, 120. Empty: the target's default."""
    workspace: int | None = None
    """Bytes of scratch memory that the builder may plan with; None: no limit."""


@dataclass
class Built:
    """What a target made and what is honestly known about it (JSON-ready values only)."""

    files: list[Path] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    layers: list[dict[str, object]] = field(default_factory=list)
    """Engine layers where the builder tells: name, kind, dtype, source nodes."""
    warnings: list[str] = field(default_factory=list)


Progress = Callable[[str], None]
"""Called with the phase that begins ('parsing', 'building …'); may be called from a thread."""


class Target(Protocol):
    """One kind of output."""

    kind: TargetKind
    versions: Mapping[str, str]

    def check(self, graph: Graph, request: BuildRequest) -> list[str]:
        """Everything that can be found wrong without building: one line each, naming node, operator and domain."""

    def build(self, model: Path, folder: Path, request: BuildRequest, progress: Progress) -> Built:
        """Build from the ONNX file `model` into `folder`. Raises TargetError with every reason found."""
