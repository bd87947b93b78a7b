"""What differs between two graphs, and the smallest parts of both that carry the difference to a tensor."""

from __future__ import annotations

from collections.abc import Iterable

from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    extract,
    load_values,
    outer_tensors,
    reads,
    to_node,
)


class Difference:
    """Which tensors of two graphs a change may have touched: those made by nodes that only one of them has, and on."""

    def __init__(self, before: Graph, after: Graph) -> None:
        self.before, self.after = before, after
        self.sides = sides = (_Side(before), _Side(after))
        for one, other in (sides, sides[::-1]):
            one.changed = {id(node) for node in one.graph.nodes if not one.same(node, other)}
        self.touched: set[str] = set()
        known = -1
        while known < len(self.touched):
            known = len(self.touched)
            for side in sides:
                side.spread(self.touched)

    def part(self, output: str) -> tuple[Graph, Graph]:
        """The parts of both graphs from what is the same in both to `output`, with one and the same interface.

        Raises ValueError where `output` is not in both graphs, or not touched.
        """
        if output not in self.touched:
            raise ValueError(f"nothing that differs leads to '{output}'")
        inputs = list(dict.fromkeys(name for side in self.sides for name in side.frontier(output, self.touched)))
        return extract(self.before, inputs, [output]), extract(self.after, inputs, [output])


class _Side:
    """One of the two graphs, by the names of its tensors."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.tensors = outer_tensors(graph)
        self.makers = {t.name: node for node in graph.nodes for t in node.outputs if t.name}
        self.changed: set[int] = set()

    def same(self, node: Node, other: _Side) -> bool:
        """Whether the other graph has this very node: operator, attributes, names around it, and constants read."""
        twin = next((other.makers[t.name] for t in node.outputs if t.name in other.makers), None)
        if twin is None or _signature(node) != _signature(twin):
            return False
        return all(_equal(mine, theirs) for mine, theirs in zip(reads(node), reads(twin), strict=True))

    def spread(self, touched: set[str]) -> None:
        """Add the results of the changed nodes, and of all that depends on touched tensors."""
        for node in self.graph.nodes:
            if id(node) in self.changed or any(t.name in touched for t in reads(node)):
                touched.update(t.name for t in node.outputs if t.name)

    def frontier(self, output: str, touched: set[str]) -> Iterable[str]:
        """The untouched tensors that the touched ones which `output` depends on are made from."""
        pending, seen, frontier = [output], {output}, []
        while pending:
            for tensor in reads(self.makers[pending.pop()]):
                if tensor.name in seen or isinstance(tensor, Constant):
                    continue
                seen.add(tensor.name)
                if tensor.name in touched and tensor.name in self.makers:
                    pending.append(tensor.name)
                else:
                    frontier.append(tensor.name)
        return frontier


def _signature(node: Node) -> bytes:
    proto = to_node(node)
    proto.name = proto.doc_string = ""
    del proto.metadata_props[:]
    return bytes(proto.SerializeToString(deterministic=True))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Of constants the values, of other tensors the names: whatever makes them is compared for itself."""
    if not isinstance(one, Constant) or not isinstance(other, Constant):
        return isinstance(one, Constant) == isinstance(other, Constant) and one.name == other.name
    if one._values is other._values:
        return True
    if tuple(one.shape) != tuple(other.shape) or one.dtype != other.dtype:
        return False
    return load_values(one).tobytes() == load_values(other).tobytes()
