"""Spells out, for ONNX Runtime, what it has no kernels for: 4-bit floats (E2M1), and scales that are powers of two.

E2M1 numbers are held as E4M3, which has all of them; E8M0 scales become float32. Both are exact, so a graph computes
the same numbers as ONNX says that it does.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx

from llmc.passes.graph import (
    Constant,
    Elementwise,
    Graph,
    Node,
    Tensor,
    Variable,
    copy_graph,
    infer_shapes,
    onnx_dtype,
    scopes,
    unlink,
)

E2M1, E8M0 = onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.FLOAT8E8M0
NARROW = {E2M1, E8M0}
CARRIER = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 6.0
STEPS = ((2.0, 0.5), (4.0, 1.0), (np.inf, 2.0))
"""(below which magnitude, distance of E2M1's numbers there)."""
FLOAT32 = np.dtype(np.float32)


def has_narrow(graph: Graph) -> bool:
    """Whether anything in the graph is of a type that is spelled out here."""
    asked = (node.attrs.get(name) for scope in scopes(graph) for node in scope.nodes for name in ("to", "output_dtype"))
    return any(onnx_dtype(tensor) in NARROW for tensor in graph.tensors().values()) or any(to in NARROW for to in asked)


def spell_out(graph: Graph) -> Graph:
    """A copy of `graph` without E2M1, and without E8M0 scales."""
    copy = copy_graph(graph)
    infer_shapes(copy)
    for scope in scopes(copy):
        nodes: list[Node] = []
        for node in scope.nodes:
            _Spelling(node, nodes).run()
        scope.nodes = nodes
    for tensor in copy.tensors().values():
        if onnx_dtype(tensor) == E2M1:
            _carry(tensor)
    return copy


def _carry(tensor: Tensor) -> None:
    """Hold E2M1 as E4M3."""
    if not isinstance(tensor, Constant):
        tensor.dtype = CARRIER
        return
    kind = onnx.TensorProto.FLOAT8E4M3FN
    tensor.values = Elementwise(kind, tensor._values, lambda values: values.astype(np.float32).astype(CARRIER))


class _Spelling:
    """One node, and those that it takes to say the same."""

    def __init__(self, node: Node, nodes: list[Node]) -> None:
        self.node, self.nodes = node, nodes
        self.made = 0

    def run(self) -> None:
        node = self.node
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            if onnx_dtype(node.inputs[1]) == E8M0:
                self._widen_scale()
            if onnx_dtype(node.outputs[0]) == E2M1:
                self._quantize()
                return
            if len(node.inputs) > 2 and onnx_dtype(node.inputs[2]) == E2M1:
                del node.inputs[2]  # its one value is 0
        elif node.op == "Cast" and node.attrs["to"] == E2M1:
            node.attrs["to"] = onnx.TensorProto.FLOAT8E4M3FN
            node.inputs[0] = self._rounded(self._float32(node.inputs[0]))
        self.nodes.append(node)

    def _widen_scale(self) -> None:
        """Let the scale be of the type that is computed in."""
        node = self.node
        if node.op == "QuantizeLinear":
            dtype = onnx_dtype(node.inputs[0])
        else:
            dtype = node.attrs.pop("output_dtype", 0) or onnx_dtype(node.outputs[0])
        scale = self._op("Cast", [node.inputs[1]], FLOAT32, to=onnx.TensorProto.FLOAT)
        if dtype != onnx.TensorProto.FLOAT:
            scale = self._op("Cast", [scale], onnx.helper.tensor_dtype_to_np_dtype(dtype), to=dtype)
        node.inputs[1] = scale

    def _quantize(self) -> None:
        """QuantizeLinear to E2M1: x / scale, rounded."""
        node = self.node
        x, scale = (self._float32(tensor) for tensor in node.inputs[:2])
        given = {name: node.attrs[name] for name in ("axis", "block_size") if name in node.attrs}
        # Whatever the axis and the blocks, what ones stand for is the scale of each element.
        ones = self._op(
            "ConstantOfShape", [self._op("Shape", [x], np.int64)], np.int8, value=Constant("", np.ones(1, np.int8))
        )
        spread = self._op("DequantizeLinear", [ones, scale], FLOAT32, **given)
        rounded = self._rounded(self._op("Div", [x, spread], FLOAT32))
        output = node.outputs[0]
        unlink(node)
        self.nodes.append(Node("Cast", node.name, {"to": onnx.TensorProto.FLOAT8E4M3FN}, [rounded], [output]))

    def _rounded(self, values: Tensor) -> Tensor:
        """float32 → the nearest of E2M1's numbers, as float32; ties to even."""
        magnitude = self._op("Abs", [values], FLOAT32)
        step: Tensor = self._number(STEPS[-1][1])
        for limit, distance in reversed(STEPS[:-1]):
            below = self._op("Less", [magnitude, self._number(limit)], np.bool_)
            step = self._op("Where", [below, self._number(distance), step], FLOAT32)
        whole = self._op("Round", [self._op("Div", [values, step], FLOAT32)], FLOAT32)
        rounded = self._op("Mul", [whole, step], FLOAT32)
        return self._op("Clip", [rounded, self._number(-LARGEST), self._number(LARGEST)], FLOAT32)

    def _float32(self, tensor: Tensor) -> Tensor:
        if onnx_dtype(tensor) == onnx.TensorProto.FLOAT:
            return tensor
        return self._op("Cast", [tensor], FLOAT32, to=onnx.TensorProto.FLOAT)

    def _number(self, value: float) -> Constant:
        return Constant(self._name(), np.asarray(value, np.float32))

    def _op(self, op: str, inputs: list[Any], dtype: Any, **attributes: Any) -> Tensor:
        made = Variable(self._name(), np.dtype(dtype), None)
        self.nodes.append(Node(op, made.name, attributes, inputs, [made]))
        return made

    def _name(self) -> str:
        self.made += 1
        return f"{self.node.name or self.node.outputs[0].name}/narrow/{self.made}"
