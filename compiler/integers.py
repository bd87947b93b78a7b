"""Has ONNX Runtime's CPU add up products of 8 bits as ONNX says: exactly, in 32 bits.

Where the processor has no VNNI, its kernels for int8 weights add pairs of products in 16 bits, which saturate; those
for uint8 weights do not. So the weights become uint8, 128 larger, as do their zero points: the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from llmc.passes.graph import (
    Array,
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
)

INT8, INT32, UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.INT32, onnx.TensorProto.UINT8
BOTH = {"ConvInteger": ((0, 2), (1, 3)), "MatMulInteger": ((0, 2), (1, 3)), "MatMulIntegerToFloat": ((0, 4), (1, 5))}
"""Operator → where its factors and their zero points stand. Source, for these and the next: ONNX operator
specifications; ONNX Runtime, ContribOperators.md."""
WEIGHT = {
    "DynamicQuantizeMatMul": (1, 3, 0),
    "QAttention": (1, 7, 6),
    "QGemm": (3, 5, 2),
    "QLinearConv": (3, 5, 2),
    "QLinearMatMul": (3, 5, 2),
}
"""The same of a weight, and where the type of the activation is told. An int8 one, whose type the result has, goes with
int8 weights alone: those stay as they are."""


def has_signed_products(graph: Graph) -> bool:
    """Whether anything in the graph multiplies int8 as integers."""
    return any(True for scope in scopes(graph) for node in scope.nodes for _ in _signed(node))


def with_unsigned_products(graph: Graph) -> Graph:
    """A copy of `graph` in which uint8 stands for the int8 that is multiplied as integers."""
    copy = copy_graph(graph)
    infer_shapes(copy)
    for scope in scopes(copy):
        nodes: list[Node] = []
        for node in scope.nodes:
            for factor, zero in list(_signed(node)):
                node.inputs.extend(Variable.empty() for _ in range(len(node.inputs), zero + 1))
                for index in (factor, zero):
                    name = f"{node.outputs[0].name}/{index}"
                    node.inputs[index] = _moved(node.inputs[index], name, nodes)
            nodes.append(node)
        scope.nodes = nodes
    return copy


def _signed(node: Node) -> Iterator[tuple[int, int]]:
    """The factors of int8, with the places of their zero points."""
    factors: tuple[tuple[int, int], ...] = BOTH.get(node.op, ())
    if node.op in WEIGHT:
        factor, zero, activation = WEIGHT[node.op]
        factors = ((factor, zero),) if onnx_dtype(node.inputs[activation]) != INT8 else ()
    yield from (places for places in factors if onnx_dtype(node.inputs[places[0]]) == INT8)


def _moved(tensor: Tensor, name: str, nodes: list[Node]) -> Tensor:
    """The int8 tensor as uint8, 128 larger; a zero point that is left out is 0. `nodes` get what computes it."""
    if tensor.is_empty():
        return Constant(name, np.array(128, np.uint8))
    if isinstance(tensor, Constant):
        return Constant(name, Elementwise(UINT8, tensor._values, _move))
    for op, settings, added, dtype in (
        ("Cast", {"to": INT32}, [], np.int32),
        ("Add", {}, [Constant(f"{name}/128", np.array(128, np.int32))], np.int32),
        ("Cast", {"to": UINT8}, [], np.uint8),
    ):
        made = Variable(f"{name}/{op}/{np.dtype(dtype).name}", np.dtype(dtype), tensor.shape)
        nodes.append(Node(op, made.name, settings, [tensor, *added], [made]))
        tensor = made
    return tensor


def _move(values: Array) -> Array:
    made: Array = values.view(np.uint8) ^ 0x80
    return made
