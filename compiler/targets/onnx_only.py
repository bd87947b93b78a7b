"""The graph and the report only: model.onnx, held against the ONNX standard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from llmc.compiler.errors import TargetError
from llmc.compiler.progress import Progress
from llmc.compiler.targets import Availability, BuildRequest, Built, TargetKind, installed_version
from llmc.compiler.targets.input_shapes import profile_problems
from llmc.passes.graph import Graph


def availability() -> Availability:
    """The onnx package is what llmc reads graphs with: it is always there."""
    return Availability("onnx", installed_version("onnx"))


@dataclass(frozen=True)
class OnnxOnly:
    """Makes no file of its own, and needs nothing but the standard."""

    reason: str = ""
    kind: TargetKind = "onnx"

    @property
    def versions(self) -> Mapping[str, str]:
        return {"onnx": availability().version}

    def check(self, graph: Graph, request: BuildRequest) -> list[str]:
        """Whether the profiles fit the graph."""
        return [*profile_problems(graph, request.profiles)]

    def build(self, model: Path, folder: Path, request: BuildRequest, progress: Progress) -> Built:  # noqa: ARG002
        """Run ONNX's full check on `model`: every node against its schema, types and shapes inferred throughout."""
        progress("checking it against the ONNX standard")
        try:
            onnx.checker.check_model(os.fspath(model), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise TargetError(f"{model.name} breaks the ONNX standard: {' '.join(str(error).split())}") from error
        return Built(facts={"checker": "onnx", "checker_version": onnx.__version__})
