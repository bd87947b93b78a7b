"""TensorRT and TensorRT-RTX: from an ONNX file to a serialized engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from onnx import TensorProto

from llmc.compiler.errors import LlmcError, TargetError
from llmc.compiler.progress import Progress
from llmc.compiler.targets import BuildRequest, Built, engine_header, installed_version, tensorrt_process
from llmc.compiler.targets.gpu import driver
from llmc.compiler.targets.input_shapes import input_shapes, profile_problems
from llmc.compiler.targets.tensorrt_check import RTX_CAPABILITIES, check_graph, default_capabilities, label
from llmc.compiler.targets.tensorrt_import import PRODUCT, Kind, availability
from llmc.compiler.targets.tensorrt_worker import BuildJob, OperatorsJob, Problem, RefusedError
from llmc.passes.graph import Graph, in_standard_operators, is_own, load_model, onnx_dtype, scopes, shape_of

ENGINE = "model.engine"
_FUSED_ATTENTION = "mha"
"""Part of the name of every engine layer that computes a whole attention in one kernel."""


@cache
def _unsupported(kind: Kind, operators: frozenset[str]) -> frozenset[str]:
    """Those for which the parser has no importer: asked once in a process of its own. Raises RefusedError."""
    job = OperatorsJob(kind=kind, operators=sorted(operators))
    return frozenset(tensorrt_process.run(job, lambda _: None))


@dataclass(frozen=True)
class TensorRT:
    """One builder for both: full TensorRT builds on, and for, the GPU of this machine; TensorRT-RTX needs none."""

    kind: Kind
    reason: str = ""

    @property
    def versions(self) -> Mapping[str, str]:
        return {self.kind: availability(self.kind).version, "polygraphy": installed_version("polygraphy")}

    def check(self, graph: Graph, request: BuildRequest) -> list[str]:
        """What TensorRT would get wrong in silence, or refuse: see `tensorrt_check`.

        llmc's own operators are looked at as the parser will see them: by their bodies.
        """
        if any(is_own(node) for scope in scopes(graph) for node in scope.nodes):
            graph = in_standard_operators(graph)
        try:
            unsupported = _unsupported(self.kind, frozenset(node.op for scope in scopes(graph) for node in scope.nodes))
        except RefusedError as refused:
            return [problem["text"] for problem in refused.problems]
        known = set(RTX_CAPABILITIES) if self.kind == "tensorrt-rtx" else set()
        capabilities = sorted(known.intersection(request.compute_capabilities))
        return [
            *self._capability_problems(request),
            *profile_problems(graph, request.profiles),
            *check_graph(graph, self.kind, capabilities, unsupported),
        ]

    def build(self, model: Path, folder: Path, request: BuildRequest, progress: Progress) -> Built:
        """Build `folder`/model.engine. The request must have no problems: they are not looked for again.

        The engine appears whole or not at all. Two builds by TensorRT-RTX give the same bytes where the model has one
        output; with several, TensorRT does not fix their order in one of the engine's tables.
        """
        try:
            graph = load_model(model)
        except (OSError, ValueError) as error:
            raise LlmcError(f"{model}: {error}") from error
        capabilities = self._capabilities(graph, request)
        partial = folder / f"{ENGINE}.partial"
        job = BuildJob(
            kind=self.kind,
            model=os.fspath(model),
            engine=os.fspath(partial),
            profiles=[input_shapes(graph, profile) for profile in request.profiles],
            compute_capabilities=capabilities,
            workspace=request.workspace,
            plugins=list(request.plugins),
        )
        try:
            known = tensorrt_process.run(job, progress)
            progress("checking the engine")
            header = self._check_engine(partial, known["engine_bytes"], capabilities)
            partial.replace(folder / ENGINE)
        except RefusedError as refused:
            raise TargetError(self._explain(graph, refused.problems)) from None
        finally:
            partial.unlink(missing_ok=True)
        return self._report(graph, request, folder / ENGINE, known, capabilities, header)

    def _capabilities(self, graph: Graph, request: BuildRequest) -> list[int]:
        """What is built for: as asked, or else all that `graph` runs on of TensorRT-RTX's default, or the GPU here."""
        if self.kind == "tensorrt-rtx":
            return sorted(set(request.compute_capabilities)) or default_capabilities(in_standard_operators(graph))
        return [sm for sm in [_gpu_capability()] if sm is not None]

    def _capability_problems(self, request: BuildRequest) -> list[str]:
        if self.kind == "tensorrt-rtx":
            wrong = [sm for sm in request.compute_capabilities if sm not in RTX_CAPABILITIES]
            return [f"TensorRT-RTX does not build for SM{sm}; it builds for {_names(RTX_CAPABILITIES)}" for sm in wrong]
        here = _gpu_capability()
        return [
            f"TensorRT builds for the GPU of this machine (SM{here}), not for SM{sm}: leave compute capabilities out, "
            "or take target tensorrt-rtx"
            for sm in request.compute_capabilities
            if sm != here
        ]

    def _check_engine(self, path: Path, written: int, capabilities: list[int]) -> engine_header.EngineHeader | None:
        """The header of what was built, where one is known, after holding it against what was asked for."""
        size = path.stat().st_size
        if size != written:
            raise TargetError(f"{PRODUCT[self.kind]} wrote {written:,} bytes of engine, but the file has {size:,}")
        if self.kind == "tensorrt":
            return None
        try:
            header = engine_header.read(path)
        except LlmcError as error:
            raise TargetError(f"what TensorRT-RTX wrote is broken: {error}") from error
        if header.compute_capabilities != tuple(capabilities) or header.other_capabilities:
            found = _names(header.compute_capabilities) + (" and others" if header.other_capabilities else "")
            raise TargetError(f"the engine is for {found}, asked for was {_names(capabilities)}")
        return header

    def _explain(self, graph: Graph, problems: list[Problem]) -> str:
        nodes = {node.name: node for scope in scopes(graph) for node in scope.nodes}
        lines = []
        for problem in problems:
            where = ""
            if problem["node"]:
                node = nodes.get(problem["node"])
                where = f"{label(node) if node else problem['node']}: "
            lines.append(f"\n  {where}{problem['text']}")
        return f"{PRODUCT[self.kind]} cannot build this graph:{''.join(lines)}"

    def _report(
        self,
        graph: Graph,
        request: BuildRequest,
        engine: Path,
        known: dict[str, Any],
        capabilities: list[int],
        header: engine_header.EngineHeader | None,
    ) -> Built:
        fused = {node for layer in known["layers"] if _FUSED_ATTENTION in layer["name"] for node in layer["nodes"]}
        decomposed = [name for name in known["attentions"] if name not in fused]
        facts: dict[str, object] = {
            "builder": PRODUCT[self.kind],
            "builder_version": known["version"],
            "compute_capabilities": capabilities,
            "engine_bytes": known["engine_bytes"],
            **({"header_version": header.version, "header_weights_bytes": header.weights_bytes} if header else {}),
            **known["memory"],
            "tf32": False,
            "network_layers": known["network_layers"],
            "inputs": _signature(graph, known["inputs"]),
            "outputs": _signature(graph, known["outputs"]),
        }
        warnings = [*known["warnings"], *_narrowed(graph), *_duplicated_weights(request)]
        if known["layers"]:
            facts |= {
                "engine_layers": len(known["layers"]),
                "engine_layers_of": _names(capabilities[:1]),
                "attention_nodes": len(known["attentions"]),
                "attention_nodes_decomposed": len(decomposed),
            }
            if decomposed:
                warnings.append(
                    f"{len(decomposed)} of {len(known['attentions'])} Attention nodes have no fused kernel and are "
                    f"computed in parts (first: '{decomposed[0]}'); float16 and head sizes of 16 to 256 have one"
                )
        return Built([engine], facts, known["layers"], warnings, known["peak_bytes"])


def _gpu_capability() -> int | None:
    """Of the GPU that CUDA takes first, for which full TensorRT builds."""
    found = driver()
    return found.gpus[0].compute_capability if found and found.gpus else None


def _names(capabilities: Sequence[int]) -> str:
    return ", ".join(f"SM{sm}" for sm in capabilities)


def _signature(graph: Graph, tensors: list[dict[str, Any]]) -> list[str]:
    """'input_ids int64[batch, sequence]': as the engine has it, dynamic sizes by their names in the graph."""
    declared = {tensor.name: shape_of(tensor) or () for tensor in (*graph.inputs, *graph.outputs)}
    lines = []
    for tensor in tensors:
        names = dict(enumerate(declared[tensor["name"]]))
        sizes = (str(size) if size >= 0 else str(names.get(axis) or "?") for axis, size in enumerate(tensor["shape"]))
        lines.append(f"{tensor['name']} {tensor['dtype']}[{', '.join(sizes)}]")
    return lines


def _narrowed(graph: Graph) -> list[str]:
    names = [name for name, tensor in graph.tensors().items() if onnx_dtype(tensor) == TensorProto.DOUBLE]
    return [f"{len(names)} float64 tensors are float32 in the engine (first: '{names[0]}')"] if names else []


def _duplicated_weights(request: BuildRequest) -> list[str]:
    static = [all(size.min == size.max for size in profile.values()) for profile in request.profiles]
    if any(static) and not all(static):
        return [f"profile {static.index(True) + 1} is static beside a dynamic one: the engine holds the weights twice"]
    return []
