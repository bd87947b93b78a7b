"""Raises a graph's opset, so that a rewrite may use an operator that came later."""

from __future__ import annotations

import onnx
import onnx.version_converter

from llmc.passes.graph import Graph, Structure, extra_attributes, from_structure, metadata, to_structure


def raise_opset(graph: Graph, version: int) -> str | None:
    """Bring `graph` to at least opset `version`, in place; None when it is there, else why it cannot be.

    ONNX's version converter rewrites the operators whose meaning changed. Weights are neither read nor copied.
    """
    if graph.opset >= version:
        return None
    structure = to_structure(graph)
    try:
        model = onnx.version_converter.convert_version(structure.model, version)
    except Exception as error:  # the converter reports an operator it has no adapter for as RuntimeError or worse
        return f"the ONNX version converter cannot raise opset {graph.opset} to {version}: {str(error).strip()}"
    take_over(graph, from_structure(Structure(model, structure.weights)))
    return None


def take_over(graph: Graph, other: Graph) -> None:
    """`graph` becomes what another tool made of it; nodes that still make the same tensor get their metadata back."""
    _keep_metadata(graph, other)
    graph.nodes, graph.inputs, graph.outputs = other.nodes, other.inputs, other.outputs
    graph.opset, graph.import_domains, graph.ir_version = other.opset, other.import_domains, other.ir_version


def _keep_metadata(before: Graph, after: Graph) -> None:
    old = {node.outputs[0].name: node for node in before.nodes if node.outputs}
    for node in after.nodes:
        source = old.get(node.outputs[0].name) if node.outputs else None
        if source is not None:
            metadata(node).update(metadata(source))
            if source.op == node.op and not extra_attributes(node):
                extra_attributes(node).extend(extra_attributes(source))
