"""Targets: what an artifact is emitted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Literal, Protocol

from llmc.compiler.errors import TargetError
from llmc.compiler.progress import Progress
from llmc.compiler.versions import version_of
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
    plugins: Sequence[str] = ()
    """Libraries of plugins that the engine may use."""


@dataclass
class Built:
    """What a target made and what is honestly known about it (JSON-ready values only)."""

    files: list[Path] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    layers: list[dict[str, object]] = field(default_factory=list)
    """Engine layers where the builder tells: name, kind, dtype, source nodes."""
    warnings: list[str] = field(default_factory=list)
    peak_bytes: int | None = None
    """The most that a builder's own process had in memory."""


class Target(Protocol):
    """One kind of output."""

    @property
    def kind(self) -> TargetKind: ...

    @property
    def reason(self) -> str:
        """Why this one was taken where the choice was 'auto'; '' where it was asked for by name."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Package → version of everything that has a say in what is built."""

    def check(self, graph: Graph, request: BuildRequest) -> list[str]:
        """Everything that can be found wrong without building: one line each, naming node, operator and domain."""

    def build(self, model: Path, folder: Path, request: BuildRequest, progress: Progress) -> Built:
        """Build from the ONNX file `model` into `folder`. Raises TargetError with every reason found."""


@dataclass(frozen=True)
class Availability:
    """Whether a target can build on this machine."""

    kind: TargetKind
    version: str
    """Of what the target builds with; '' where it is not installed."""
    missing: str = ""
    """What stands in the way; '' where nothing does."""
    install: str = ""
    """The command that gets what is missing; '' where none would."""


def installed_version(*distributions: str) -> str:
    """The version of the first of these distributions that is installed; '' where none is."""
    for name in distributions:
        try:
            return version_of(name)
        except PackageNotFoundError:
            continue
    return ""


def availability() -> tuple[Availability, ...]:
    """Of every kind of target, in the order in which 'auto' prefers them."""
    from llmc.compiler.targets import onnx_only, onnxruntime, tensorrt_import

    return (
        tensorrt_import.availability("tensorrt"),
        tensorrt_import.availability("tensorrt-rtx"),
        onnxruntime.availability(),
        onnx_only.availability(),
    )


def resolve(kind: TargetKind) -> Target:
    """The target of a kind; 'auto' is the first that can build here, and its `reason` says why no other was.

    Raises TargetError where a kind that is asked for by name cannot build on this machine.
    """
    found = availability()
    if kind == "auto":
        index = next(index for index, entry in enumerate(found) if not entry.missing)
        passed = "".join(f"; not {entry.kind}: {entry.missing}" for entry in found[:index])
        return _target(found[index].kind, f"the first that can build here{passed}")
    entry = next(entry for entry in found if entry.kind == kind)
    if entry.missing:
        advice = f"install it with: {entry.install}" if entry.install else "tensorrt-rtx builds without a GPU"
        raise TargetError(f"target '{kind}' cannot build here: {entry.missing}; {advice}")
    return _target(kind, "")


def _target(kind: TargetKind, reason: str) -> Target:
    from llmc.compiler.targets.onnx_only import OnnxOnly
    from llmc.compiler.targets.onnxruntime import OnnxRuntime
    from llmc.compiler.targets.tensorrt import TensorRT

    if kind == "tensorrt" or kind == "tensorrt-rtx":
        return TensorRT(kind, reason)
    return OnnxRuntime(reason) if kind == "onnxruntime" else OnnxOnly(reason)
