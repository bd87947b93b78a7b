"""What the integers of an input may be."""

from __future__ import annotations

from collections.abc import Iterator

from llmc.passes.graph import Constant, Graph, Tensor

_MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def index_bounds(graph: Graph) -> dict[str, int]:
    """Input name → rows of the smallest table that it indexes (Gather along axis 0): its values stay below that."""
    bounds = {}
    for tensor in graph.inputs:
        tables = list(_tables(tensor))
        if tables:
            bounds[tensor.name] = min(tables)
    return bounds


def _tables(indices: Tensor) -> Iterator[int]:
    for node in indices.outputs:
        if node.op == "Gather" and node.inputs[1] is indices and isinstance(node.inputs[0], Constant):
            if node.attrs.get("axis", 0) == 0:
                yield node.inputs[0].shape[0]
        elif node.op in _MOVES and node.inputs[0] is indices:
            yield from _tables(node.outputs[0])
