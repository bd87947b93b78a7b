"""Parts of a model in ONNX's own form: some of its nodes as a model that runs by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import onnx

from llmc.passes.base import LlmcError
from llmc.passes.graph import Structure

LARGE = 1 << 20
"""Bytes from which a weight is large."""


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names of what a node reads, those that its subgraphs capture among them."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == attribute.GRAPH:
            yield from _captured(attribute.g)


def _captured(graph: onnx.GraphProto) -> Iterator[str]:
    own = {value.name for value in (*graph.input, *graph.initializer)}
    own |= {name for node in graph.node for name in node.output}
    names = [name for node in graph.node for name in reads(node)]
    yield from (name for name in (*names, *(output.name for output in graph.output)) if name not in own)


def by_what_they_read(
    nodes: Sequence[onnx.NodeProto], constants: Collection[str]
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Nodes in topological order: those that depend on the constants alone, and the others."""
    known = set(constants)
    fixed: list[onnx.NodeProto] = []
    rest: list[onnx.NodeProto] = []
    for node in nodes:
        alone = all(name in known for name in reads(node))
        (fixed if alone else rest).append(node)
        if alone:
            known.update(node.output)
    return fixed, rest


def computed_weights(structure: Structure, least: int = LARGE) -> dict[str, onnx.NodeProto]:
    """Tensor → the node that makes it: those computed from constants alone, of which one has `least` bytes or more."""
    large = {name for name, held in structure.weights.items() if held.nbytes >= least}
    fixed, _ = by_what_they_read(structure.model.graph.node, {t.name for t in structure.model.graph.initializer})
    found: dict[str, onnx.NodeProto] = {}
    for node in fixed:
        if any(name in large or name in found for name in reads(node)):
            found |= {name: node for name in node.output if name}
    return found


def element_types(structure: Structure) -> dict[str, int]:
    """Tensor → its ONNX element type, where it is known."""
    graph = structure.model.graph
    infos = (*graph.value_info, *graph.input, *graph.output)
    types = {info.name: info.type.tensor_type.elem_type for info in infos if info.type.HasField("tensor_type")}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: kind for name, kind in types.items() if kind}


def part_of(
    structure: Structure,
    nodes: Sequence[onnx.NodeProto],
    types: Mapping[str, int],
    outputs: Sequence[str] = (),
) -> Structure:
    """The nodes, in topological order, as a model of their own that gives `outputs`.

    Its inputs are the tensors that the nodes read and do not make, of the element types `types`; the constants among
    them come along. Raises LlmcError for an input of unknown type.
    """
    read = {name for node in nodes for name in reads(node)}
    made = {name for node in nodes for name in node.output}
    whole = structure.model.graph
    part = onnx.ModelProto(ir_version=structure.model.ir_version, opset_import=structure.model.opset_import)
    part.functions.extend(structure.model.functions)
    part.graph.name = whole.name
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(t for t in whole.initializer if t.name in read)
    part.graph.value_info.extend(info for info in whole.value_info if info.name in made)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    constants = {tensor.name for tensor in part.graph.initializer}
    for name in sorted(read - made - constants):
        if name not in types:
            raise LlmcError(f"the type of '{name}' is not known")
        part.graph.input.append(onnx.helper.make_tensor_value_info(name, types[name], None))
    return Structure(part, {name: structure.weights[name] for name in constants & structure.weights.keys()})
