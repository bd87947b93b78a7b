"""Types and shapes of one node's results, from those of its inputs."""

from __future__ import annotations

from typing import Any

import onnx

from llmc.passes.graph import SMALL, Constant, Node, Tensor, constant_bytes, load_values, numpy_dtype, onnx_dtype

Known = dict[str, onnx.TypeProto]


def infer_node(node: Node, opset: int, *, overwrite: bool = False) -> None:
    """Write what ONNX's inference says of the node's results, where nothing is known yet (or anyhow: `overwrite`).

    A node that ONNX does not define, or whose inputs are of unknown type, is left as it is.
    """
    if not overwrite and all(t.dtype is not None and t.shape is not None for t in node.outputs if t.name):
        return
    if any(True for _ in node.subgraphs()) or not onnx.defs.has(node.op, opset, node.domain or ""):
        return
    given = [t for t in node.inputs if t.name]
    known = {t.name: _type(t) for t in given if onnx_dtype(t)}
    schema = onnx.defs.get_schema(node.op, opset, node.domain or "")
    proto = onnx.helper.make_node(
        node.op, [t.name for t in node.inputs], [t.name for t in node.outputs], **_plain_attributes(node)
    )
    data = {
        t.name: onnx.numpy_helper.from_array(load_values(t)) for t in given if isinstance(t, Constant) and _is_small(t)
    }
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, proto, known, data, opset_imports=[_import(opset)])
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, KeyError):
        return
    for tensor in node.outputs:
        if tensor.name in found and not isinstance(tensor, Constant):
            _write(tensor, found[tensor.name], overwrite)


def _plain_attributes(node: Node) -> dict[str, Any]:
    return {k: v for k, v in node.attrs.items() if not isinstance(v, Constant)} | {
        k: onnx.numpy_helper.from_array(load_values(v)) for k, v in node.attrs.items() if isinstance(v, Constant)
    }


def _import(opset: int) -> onnx.OperatorSetIdProto:
    return onnx.helper.make_opsetid("", opset)


def _is_small(constant: Constant) -> bool:
    return constant.dtype.kind in "iu" and constant_bytes(constant) <= SMALL


def _type(tensor: Tensor) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(onnx_dtype(tensor), tensor.shape)


def _write(tensor: Tensor, found: onnx.TypeProto, overwrite: bool) -> None:
    if not found.HasField("tensor_type"):
        return
    kind = found.tensor_type
    if kind.elem_type and (overwrite or tensor.dtype is None):
        tensor.dtype = numpy_dtype(kind.elem_type)
    if kind.HasField("shape") and (overwrite or tensor.shape is None):
        tensor.shape = [d.dim_param or (d.dim_value if d.HasField("dim_value") else None) for d in kind.shape.dim]
