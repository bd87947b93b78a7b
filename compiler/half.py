"""Makes ONNX Runtime's CPU round as a GPU does where a graph says float16 or bfloat16.

ONNX Runtime runs most float16 operators on the CPU in float32 and drops its own casts between them, so that values
never get rounded, and an overflow never shows. Here every such operator is spelled out: its inputs are cast to
float32, it computes, and its result is cast back. Casts that the graph itself has are kept by ONNX Runtime. bfloat16,
for which its CPU has hardly any operator, becomes runnable by the same means; its inputs and outputs, which the Python
interface does not take, become float32, with a Cast inside.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx

from llmc.passes.graph import Graph, Node, Tensor, Variable, copy_graph, infer_shapes, numpy_dtype, onnx_dtype, scopes

HALF = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
EXACT = {"Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Size", "Gather"}
"""Operators that only move values, in any type."""


def has_halves(graph: Graph) -> bool:
    """Whether anything in the graph is float16 or bfloat16."""
    return any(onnx_dtype(t) in HALF for t in graph.tensors().values())


def round_halves(graph: Graph, extra_outputs: Collection[str] = ()) -> Graph:
    """A copy of `graph` in which each float16 or bfloat16 operator computes in float32 and rounds its result once.

    Those of the `extra_outputs` that are bfloat16 become outputs too.
    """
    copy = copy_graph(graph)
    infer_shapes(copy)
    own = {tensor.name for tensor in copy.outputs}
    found = [t for name, t in copy.tensors().items() if name in extra_outputs and name not in own]
    copy.outputs += [t for t in found if onnx_dtype(t) == onnx.TensorProto.BFLOAT16]
    for scope in scopes(copy):
        widened: dict[int, Tensor] = {}
        nodes: list[Node] = []
        for node in scope.nodes:
            if node.op in EXACT or any(True for _ in node.subgraphs()):
                nodes.append(node)
                continue
            halves = [i for i, t in enumerate(node.inputs) if onnx_dtype(t) in HALF]
            for index in halves:
                tensor = node.inputs[index]
                if id(tensor) not in widened:
                    wide = Variable(f"{tensor.name}/wide", numpy_dtype(onnx.TensorProto.FLOAT), tensor.shape)
                    nodes.append(Node("Cast", wide.name, {"to": onnx.TensorProto.FLOAT}, [tensor], [wide]))
                    widened[id(tensor)] = wide
                node.inputs[index] = widened[id(tensor)]
            nodes.append(node)
            if halves:
                nodes.extend(_narrow(node))
        scope.nodes = nodes
    _widen_border(copy)
    return copy


def _widen_border(graph: Graph) -> None:
    """Let bfloat16 inputs and outputs be float32 under their names."""
    before: list[Node] = []
    after: list[Node] = []
    for tensors, nodes in ((graph.inputs, before), (graph.outputs, after)):
        for index, tensor in enumerate(tensors):
            if onnx_dtype(tensor) != onnx.TensorProto.BFLOAT16:
                continue
            outside = Variable(tensor.name, numpy_dtype(onnx.TensorProto.FLOAT), tensor.shape)
            tensor.name += "/narrow"
            tensors[index] = outside
            ends = [outside, tensor] if nodes is before else [tensor, outside]
            nodes.append(Node("Cast", tensor.name, {"to": onnx_dtype(ends[1])}, ends[:1], ends[1:]))
    graph.nodes = [*before, *graph.nodes, *after]


def _narrow(node: Node) -> list[Node]:
    """Casts from what the widened node makes to the tensors that it made before."""
    casts = []
    for index, tensor in enumerate(list(node.outputs)):
        to = onnx_dtype(tensor)
        if tensor.name and to in HALF:
            wide = Variable(f"{tensor.name}/computed", numpy_dtype(onnx.TensorProto.FLOAT), tensor.shape)
            node.outputs[index] = wide
            casts.append(Node("Cast", wide.name, {"to": to}, [wide], [tensor]))
    return casts
