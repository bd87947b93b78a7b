"""A part of a graph, as a graph of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from llmc.passes.graph.edit import fresh_names, reads
from llmc.passes.graph.inference import infer_shapes
from llmc.passes.graph.onnx_export import to_structure
from llmc.passes.graph.onnx_import import from_structure
from llmc.passes.graph.tensors import Constant, Graph, Structure, Tensor, onnx_dtype


def extract(graph: Graph, inputs: Sequence[str], outputs: Sequence[str]) -> Graph:
    """The smallest graph that makes `outputs` from `inputs`: tensors of the outermost scope, named in any order.

    An independent copy, in the graph's order of nodes, that shares the values of constants; constants among `inputs`
    are left out, for they come along. Types and shapes of the boundary are those of the tensors; where the type of an
    input is not known, the shapes of `graph` are inferred first. Raises ValueError for a name that no tensor has, for
    an output that depends on something outside, and for an input whose type cannot be known.
    """
    tensors = outer_tensors(graph)
    missing = [name for name in (*inputs, *outputs) if name not in tensors]
    if missing:
        raise ValueError(f"the graph has no tensor '{missing[0]}' outside of subgraphs")
    cut = [t for t in (tensors[name] for name in dict.fromkeys(inputs)) if not isinstance(t, Constant)]
    given_back = [tensors[name] for name in dict.fromkeys(outputs)]
    needed = _needed(given_back, cut)
    if any(not _typed(tensor) for tensor in cut):
        infer_shapes(graph)
    untyped = next((tensor.name for tensor in cut if not _typed(tensor)), None)
    if untyped is not None:
        raise ValueError(f"the type of '{untyped}' is not known")
    part = Graph(
        nodes=[node for node in graph.nodes if id(node) in needed],
        inputs=cut,
        outputs=given_back,
        name=graph.name,
        opset=graph.opset,
        import_domains=graph.import_domains,
        producer_name=graph.producer_name,
        producer_version=graph.producer_version,
        ir_version=graph.ir_version,
    )
    part.metadata = dict(graph.metadata)
    structure = to_structure(part)
    _free_inputs(structure, fresh_names(part))
    return from_structure(structure)


def outer_tensors(graph: Graph) -> dict[str, Tensor]:
    """Name → tensor, of the outermost scope: inputs, what nodes read there, and what they make."""
    tensors = {tensor.name: tensor for tensor in graph.inputs}
    for node in graph.nodes:
        tensors.update((tensor.name, tensor) for tensor in (*node.inputs, *node.outputs) if tensor.name)
    tensors.update((tensor.name, tensor) for tensor in graph.outputs)
    return tensors


def _needed(outputs: Iterable[Tensor], cut: Iterable[Tensor]) -> set[int]:
    """Ids of the nodes that `outputs` depend on, back to `cut`."""
    seen = {id(tensor) for tensor in cut}
    needed: set[int] = set()
    pending = list(outputs)
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or isinstance(tensor, Constant):
            continue
        seen.add(id(tensor))
        if not tensor.inputs:
            raise ValueError(f"'{tensor.name}' is needed, and is not among the inputs")
        for node in tensor.inputs:
            if id(node) not in needed:
                needed.add(id(node))
                pending.extend(reads(node))
    return needed


def _typed(tensor: Tensor) -> bool:
    return bool(onnx_dtype(tensor)) or tensor.type_proto is not None


def _free_inputs(structure: Structure, fresh: Callable[[str], str]) -> None:
    """Give other names to results that are inputs now, of nodes that are there for another result of theirs."""
    inputs = {info.name for info in structure.model.graph.input}
    for node in structure.model.graph.node:
        for index, name in enumerate(node.output):
            if name in inputs:
                node.output[index] = fresh(name)
