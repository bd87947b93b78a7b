"""Types and shapes, by ONNX's own inference."""

from __future__ import annotations

import onnx
import onnx.inliner

from llmc.passes.graph.collector import collector_paused
from llmc.passes.graph.onnx_export import to_structure
from llmc.passes.graph.onnx_import import tensor_type
from llmc.passes.graph.tensors import (
    Constant,
    Graph,
)


@collector_paused()
def infer_shapes(graph: Graph) -> None:
    """Write the types and shapes that ONNX's inference finds (data propagation on) to the tensors of all scopes.

    Weights are not read. A shape known before and lost by the inference is kept.
    """
    _write_shapes(graph, onnx.shape_inference.infer_shapes(to_structure(graph).model, data_prop=True).graph)


def _write_shapes(graph: Graph, inferred: onnx.GraphProto) -> None:
    made = {t.name: t for node in graph.nodes for t in node.outputs if not isinstance(t, Constant)}
    for info in (*inferred.value_info, *inferred.output):
        tensor = made.get(info.name)
        if tensor is None or info.type.WhichOneof("value") != "tensor_type":
            continue
        dtype, shape = tensor_type(info.type.tensor_type)
        if dtype is not None:
            tensor.dtype = dtype
        if shape is not None:
            tensor.shape = _merge_shapes(tensor.shape, shape)
    for node, proto in zip(graph.nodes, inferred.node, strict=True):
        for name, value in node.attrs.items():
            if isinstance(value, Graph):
                _write_shapes(value, next(a.g for a in proto.attribute if a.name == name))


def _merge_shapes(old: list[int | str | None] | None, new: list[int | str | None]) -> list[int | str | None]:
    """Dimension by dimension the better known: a number before a name, a name before nothing."""
    if old is None or len(old) != len(new):
        return new
    return [n if isinstance(n, int) or (o is None) else o for o, n in zip(old, new, strict=True)]
