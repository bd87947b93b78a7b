"""Puts new nodes into a scope where what they read has been made, and takes out what they replace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from llmc.passes.graph import Graph, Node, unlink


class Placement:
    """Changes to the nodes of one scope, whose order is kept; `finish` writes them to the scope."""

    def __init__(self, scope: Graph, given_back: set[int]) -> None:
        self.scope, self.given_back = scope, given_back
        self._index = {id(node): index for index, node in enumerate(scope.nodes)}
        self._after: dict[int, list[Node]] = defaultdict(list)
        self._removed: set[int] = set()

    def after(self, anchor: Node, nodes: Iterable[Node]) -> None:
        """Put new nodes, in order, where `anchor` is or was."""
        for node in nodes:
            self._put(self._index[id(anchor)], node)

    def early(self, nodes: Iterable[Node]) -> None:
        """Put new nodes, in order, right after what they read."""
        for node in nodes:
            makers = [maker for tensor in node.inputs for maker in tensor.inputs]
            self._put(max((self._index[id(m)] for m in makers if id(m) in self._index), default=-1), node)

    def _put(self, index: int, node: Node) -> None:
        self._index[id(node)] = index
        self._after[index].append(node)

    def remove(self, node: Node) -> None:
        """Take a node out, and with it what only it needed."""
        pending = [node]
        while pending:
            node = pending.pop()
            needed = list(node.inputs)
            unlink(node)
            self._removed.add(id(node))
            for tensor in needed:
                maker = tensor.inputs[0] if tensor.inputs else None
                if maker is not None and id(maker) in self._index and self._is_unused(maker):
                    pending.append(maker)

    def remove_unused(self, node: Node) -> None:
        """Take a node out where nothing reads its results any more."""
        if id(node) in self._index and self._is_unused(node):
            self.remove(node)

    def _is_unused(self, node: Node) -> bool:
        return all(not tensor.outputs and id(tensor) not in self.given_back for tensor in node.outputs)

    def finish(self) -> None:
        """Write the changes to the scope."""
        nodes = list(self._after[-1])
        for index, node in enumerate(self.scope.nodes):
            nodes += [node, *self._after[index]]
        self.scope.nodes = [node for node in nodes if id(node) not in self._removed]
