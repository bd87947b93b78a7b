"""The pass `separate-residuals`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from llmc.passes.base import Context, NearMiss, Pass, PassResult, Safety
from llmc.passes.graph import Graph, Node, module_of, outputs_of_scopes, scopes

FLOAT32 = np.dtype(np.float32)


class SeparateResiduals(Pass):
    """Keeps ONNX Runtime from fusing a residual Add with the LayerNormalization after it, which its CPU runs slower.

    LayerNormalization(Add(x, r)) → LayerNormalization(Sum(x, r)), x and r float32 of any shape. ONNX Runtime fuses the
    first to SkipLayerNormalization, whose kernel computes one value at a time; Sum is the same addition, which it fuses
    with nothing. On [8, 64, 384] the fused kernel takes four times as long as Sum and LayerNormalization (ONNX Runtime
    1.31, AVX-512). Stands late in a recipe: other passes look for Add.

    **Safety:** exact.

    Source: ONNX operators Add and Sum; ONNX Runtime, ContribOperators.md, SkipLayerNormalization.
    """

    targets: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")
    safety: ClassVar[Safety] = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        context.infer_shapes(graph)
        given_back = outputs_of_scopes(graph)
        for scope in scopes(graph):
            for node in scope.nodes:
                if not _is_residual(node):
                    continue
                problem = _problem(node, given_back)
                if problem is not None:
                    result.near_misses.append(NearMiss("SeparateResiduals", node.name, problem, module_of(node)))
                elif context.apply(result, "SeparateResiduals", node):
                    node.op = "Sum"
        return result


def _is_residual(node: Node) -> bool:
    """Whether a LayerNormalization normalises what this Add gives."""
    if node.op != "Add" or node.domain:
        return False
    users = node.outputs[0].outputs
    return any(u.op == "LayerNormalization" and not u.domain and u.inputs[0] is node.outputs[0] for u in users)


def _problem(node: Node, given_back: set[int]) -> str | None:
    """Why ONNX Runtime leaves this Add alone by itself, or has no Sum for it."""
    total = node.outputs[0]
    if total.dtype != FLOAT32:
        return f"'{total.name}' is {total.dtype if total.dtype is not None else 'of unknown type'}, not float32"
    if id(total) in given_back:
        return f"'{total.name}' is an output of the graph: ONNX Runtime does not fuse it"
    if len(total.outputs) > 1:
        return f"'{total.name}' has other users: ONNX Runtime does not fuse it"
    return None
