"""ONNX Runtime: the optimized ONNX file itself, proved to load, for machines that will never see a GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from llmc.compiler.blocks import WHOLE_BYTES
from llmc.compiler.errors import LlmcError, TargetError
from llmc.compiler.integers import has_signed_products
from llmc.compiler.progress import Progress
from llmc.compiler.report.text import scaled
from llmc.compiler.session import Session
from llmc.compiler.targets import Availability, BuildRequest, Built, TargetKind, installed_version
from llmc.compiler.targets.input_shapes import profile_problems
from llmc.passes.graph import Graph, load_model

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
SATURATES = (
    "this processor has no VNNI: here ONNX Runtime adds products of uint8 and int8 in 16 bits, which saturate, and may "
    "lose more than verification shows, which is exact; its session option session.x64quantprecision=1 has them exact"
)
_LENGTH = 64
"""Products in a sum that is tried."""
_ERRORS_ONLY = 3
"""Log severity."""


def availability() -> Availability:
    """ONNX Runtime is what llmc verifies with: it is always there."""
    return Availability("onnxruntime", installed_version(*DISTRIBUTIONS))


@dataclass(frozen=True)
class OnnxRuntime:
    """Makes no file of its own: the artifact's model.onnx is what ONNX Runtime takes."""

    reason: str = ""
    kind: TargetKind = "onnxruntime"

    @property
    def versions(self) -> Mapping[str, str]:
        return {"onnxruntime": availability().version}

    def check(self, graph: Graph, request: BuildRequest) -> list[str]:
        """Whether the profiles fit the graph, and ONNX Runtime takes all of its operators and types."""
        problems = [*profile_problems(graph, request.profiles)]
        try:
            Session(graph)
        except LlmcError as error:
            problems.append(str(error))
        return problems

    def build(self, model: Path, folder: Path, request: BuildRequest, progress: Progress) -> Built:  # noqa: ARG002
        """Load `model` as its users will, with ONNX Runtime's default optimizations, on the CPU.

        Those copy the weights: a model of more than `WHOLE_BYTES` is loaded without them, and stays a mapped file. One
        that is larger than this machine's memory is not loaded, which is said: it is for another machine.
        """
        import onnxruntime as ort

        size = sum(path.stat().st_size for path in folder.glob(f"{model.name}*"))
        facts: dict[str, object] = {"builder": "ONNX Runtime", "builder_version": ort.__version__}
        if size > memory_bytes():
            here = f"{scaled(size, 'B')}, and this machine has {scaled(memory_bytes(), 'B')} of memory"
            return Built(facts=facts, warnings=[f"{model.name} was not loaded in ONNX Runtime: it has {here}"])
        progress("loading it in ONNX Runtime")
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        large = size > WHOLE_BYTES
        if large:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            session = ort.InferenceSession(os.fspath(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a class of its own for every status code
            raise TargetError(f"ONNX Runtime cannot load {model.name}: {error}") from error
        warnings = [SATURATES] if saturates() and has_signed_products(load_model(model)) else []
        return Built(
            warnings=warnings,
            facts=facts
            | {
                "optimizations": "not tried: they would copy the weights" if large else "default",
                "providers": session.get_providers(),
                "inputs": [_signature(tensor) for tensor in session.get_inputs()],
                "outputs": [_signature(tensor) for tensor in session.get_outputs()],
            },
        )


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@cache
def saturates() -> bool:
    """Whether products of uint8 and int8 are inexact on this machine, as they are on x86 processors without VNNI."""
    import onnxruntime as ort

    text = f"""<ir_version: 8, opset_import: ["": 10]>
        g (uint8[1, {_LENGTH}] x, int8[{_LENGTH}, 32] w) => (int32[1, 32] y) {{ y = MatMulInteger(x, w) }}"""
    model = onnx.parser.parse_model(text).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = {"x": np.full((1, _LENGTH), 255, np.uint8), "w": np.full((_LENGTH, 32), 127, np.int8)}
    return bool((session.run(None, feeds)[0] != 255 * 127 * _LENGTH).any())


def _signature(tensor: Any) -> str:
    """'input_ids int64[batch, sequence]'."""
    element = tensor.type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(element, element)
    return f"{tensor.name} {dtype}[{', '.join('?' if size is None else str(size) for size in tensor.shape)}]"
