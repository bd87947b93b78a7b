"""Types and shapes, by ONNX's own inference."""

from __future__ import annotations

from collections.abc import Container, Iterator

import onnx

from llmc.passes.graph.collector import collector_paused
from llmc.passes.graph.edit import reads, scopes
from llmc.passes.graph.onnx_export import to_structure
from llmc.passes.graph.onnx_import import tensor_type
from llmc.passes.graph.tensors import Constant, Graph, Node, Tensor


@collector_paused()
def infer_shapes(graph: Graph) -> None:
    """Write the types and shapes that ONNX's inference finds (data propagation on) to the tensors of all scopes.

    Weights are not read. A shape known before and lost by the inference is kept.
    """
    graph.inferences += 1
    _write_shapes(graph, onnx.shape_inference.infer_shapes(to_structure(graph).model, data_prop=True).graph)


def infer_missing_shapes(graph: Graph) -> None:
    """What `infer_shapes` finds once it has been run before a rewrite: a tensor known to the last dimension stays so.

    ONNX is shown only nodes whose results are not that well known, and the integer arithmetic that they depend on.
    """
    names = {size for tensor in graph.inputs for size in tensor.shape or () if isinstance(size, str)}
    wanted: set[int] = set()
    found: list[Node] = []
    for node in reversed(graph.nodes):
        if any(id(tensor) in wanted for tensor in node.outputs) or not all(_is_known(t, names) for t in _made(node)):
            found.append(node)
            wanted.update(id(tensor) for tensor in reads(node) if _may_be_shape(tensor))
    if found:
        made = {id(tensor) for node in found for tensor in node.outputs}
        outside = {id(t): t for node in found for t in reads(node) if id(t) not in made and not isinstance(t, Constant)}
        part = Graph(found[::-1], list(outside.values()), opset=graph.opset, import_domains=graph.import_domains)
        part.ir_version = graph.ir_version
        infer_shapes(part)
        graph.inferences += 1


def _made(node: Node) -> Iterator[Tensor]:
    """What a node makes, and what is made inside it."""
    yield from node.outputs
    if node.attrs:
        for subgraph in node.subgraphs():
            yield from (tensor for scope in scopes(subgraph) for inner in scope.nodes for tensor in inner.outputs)


def _is_known(tensor: Tensor, names: Container[str]) -> bool:
    """Whether the type and every dimension are known: as numbers, or by the names that inputs of the graph have."""
    if isinstance(tensor, Constant) or not tensor.name:
        return True
    if tensor.dtype is None or tensor.shape is None:
        return False
    return all(isinstance(size, int) or size in names for size in tensor.shape)


def _may_be_shape(tensor: Tensor) -> bool:
    """Whether the values, not the type alone, may tell a shape that is made of them."""
    if isinstance(tensor, Constant):
        return False
    return (tensor.dtype is None or tensor.dtype.kind == "i") and (tensor.shape is None or len(tensor.shape) < 2)


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
