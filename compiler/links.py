"""Weights that stay in the source's files: the artifact links these, and its ONNX file refers to places in them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from llmc.compiler.cache.memory import KeptWeights
from llmc.compiler.disk import probe_beside
from llmc.compiler.errors import LlmcError
from llmc.compiler.targets import TargetKind
from llmc.passes.graph import FileRegion, Graph, Weights, clone, constants

_ADVICE = "leave --link-weights (target.link_weights) out, and they are copied"


def linkable(graphs: Iterable[Graph], output: Path, kind: TargetKind) -> frozenset[Path]:
    """The source's own files that weights of these graphs stand in.

    Raises LlmcError where one cannot be linked beside `output`, or the target would not read what is linked.
    """
    files = {path for graph in graphs for path in _files(graph)}
    for path in sorted(files):
        with probe_beside(output) as probe:
            if clone(path, probe):
                continue
            try:
                os.link(path.resolve(), probe)
            except OSError as error:
                problem = f"{path} cannot be linked beside {output}: {error.strerror}"
                raise LlmcError(f"{problem}; {_ADVICE}") from error
        if kind == "onnx":
            problem = f"target onnx takes no hard link to {path}: the onnx package refuses files of two names"
            raise LlmcError(f"{problem}; {_ADVICE}")
    return frozenset(files)


def _files(graph: Graph) -> Iterable[Path]:
    for constant in constants(graph):
        held = constant._values
        region = held.region() if isinstance(held, Weights) and not isinstance(held, KeptWeights) else None
        if type(region) is FileRegion:  # and none of this compile's own
            yield region.path
