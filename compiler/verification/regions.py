"""What a step changed in a graph: the nodes that it took away and put there, region by region."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

import onnx

from llmc.compiler.parts import element_types, reads
from llmc.passes.graph import FileRegion, Structure, Weights


@dataclass(frozen=True)
class Region:
    """Nodes gone and nodes new that hand tensors to one another, and nothing to any other changed node."""

    gone: tuple[onnx.NodeProto, ...]
    new: tuple[onnx.NodeProto, ...]
    outputs: tuple[str, ...]
    """The tensors that were there before and are there after, and that something outside reads."""


def changed_regions(
    old: Side,
    new: Side,
    moved: Collection[str] = (),
    equal: Callable[[str, str], bool] = lambda _before, _after: False,
) -> list[Region]:
    """The regions in which two graphs differ, in the order of the second.

    A node is the same where operator, attributes, constants, and the names and types of all else that it reads and
    makes are. `equal` says of two tensors of the first graph whether they have the same value: a node that reads the
    other one now is the same too. What reads or makes one of the tensors `moved` counts as changed: they stand for
    something else than before. A region without `outputs` matters to nobody: it was dead, or is.
    """
    moved = {*moved, *(n for n in old.types.keys() & new.types.keys() if old.types[n] != new.types[n])}
    gone = [node for key, node in old.nodes.items() if key not in new.nodes or _touches(node, moved)]
    come = [node for key, node in new.nodes.items() if key not in old.nodes or _touches(node, moved)]
    gone, come = _without_twins(old, new, gone, come, equal)
    groups = _Groups([*gone, *come])
    changed = {id(node) for node in come}
    graph = new.structure.model.graph
    read_outside = {name for node in graph.node if id(node) not in changed for name in reads(node)}
    read_outside |= {info.name for info in graph.output}
    known = old.tensors & new.tensors & read_outside
    found: dict[str, tuple[list[onnx.NodeProto], list[onnx.NodeProto]]] = defaultdict(lambda: ([], []))
    for side, nodes in ((1, come), (0, gone)):
        for node in nodes:
            found[groups.of(node)][side].append(node)
    return [
        Region(
            tuple(taken),
            tuple(put),
            tuple(dict.fromkeys(n for node in (*put, *taken) for n in node.output if n in known)),
        )
        for taken, put in found.values()
    ]


def _without_twins(
    old: Side,
    new: Side,
    gone: Sequence[onnx.NodeProto],
    come: Sequence[onnx.NodeProto],
    equal: Callable[[str, str], bool],
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes gone and come, without those that read, where they changed at all, what has the same value."""
    made = {name for node in come for name in node.output}
    before = {tuple(node.output): node for node in gone}
    twins: set[int] = set()
    for node in come:
        twin = before.get(tuple(node.output))
        if twin is None or old.operation(twin) != new.operation(node) or len(twin.input) != len(node.input):
            continue
        pairs = [
            (a, b)
            for a, b in zip(reads(twin), reads(node), strict=False)
            if old.constants.get(a, a) != new.constants.get(b, b)
        ]
        if pairs and all(b not in made and equal(a, b) for a, b in pairs):
            twins |= {id(twin), id(node)}
    return [n for n in gone if id(n) not in twins], [n for n in come if id(n) not in twins]


def _touches(node: onnx.NodeProto, moved: Collection[str]) -> bool:
    return bool(moved) and any(name in moved for name in (*reads(node), *node.output))


class Side:
    """A graph that is to be compared with another: its nodes by all that tells one from another."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        graph = structure.model.graph
        self.types = element_types(structure)
        self.opsets: dict[str, int] = {entry.domain: entry.version for entry in self.structure.model.opset_import}
        self.constants = {tensor.name: self._constant(tensor) for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Identity" and not node.domain and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]]
        self.nodes = {self._key(node): node for node in graph.node}
        self.tensors = {info.name for info in (*graph.input, *graph.initializer)}
        self.tensors |= {name for node in graph.node for name in node.output if name}

    def _constant(self, tensor: onnx.TensorProto) -> Hashable:
        """The same for the same values: large ones by where they are held, for graphs share them."""
        if tensor.name in self.structure.weights:
            held = self.structure.weights[tensor.name]
            source = held.source if isinstance(held, Weights) else None
            if not isinstance(source, FileRegion):
                return id(held)
            return (tensor.data_type, tuple(tensor.dims), source.path, source.offset)
        return (tensor.data_type, tuple(tensor.dims), tensor.raw_data or tensor.SerializeToString(deterministic=True))

    def _key(self, node: onnx.NodeProto) -> Hashable:
        read = tuple(self.constants.get(name, name) for name in reads(node))
        return (self.operation(node), read, len(node.input), tuple(node.output))

    def operation(self, node: onnx.NodeProto) -> Hashable:
        """What the node does, whatever it reads."""
        attributes = sorted((a.name, a.SerializeToString(deterministic=True)) for a in node.attribute)
        return (node.op_type, node.domain, self._version(node), tuple(attributes))

    def _version(self, node: onnx.NodeProto) -> int:
        """Of the operator: another one may mean another thing."""
        version = self.opsets.get(node.domain, 1)
        if not onnx.defs.has(node.op_type, node.domain):
            return version
        since: int = onnx.defs.get_schema(node.op_type, version, node.domain).since_version
        return since


class _Groups:
    """Changed nodes, joined where one makes what another reads or made."""

    def __init__(self, nodes: list[onnx.NodeProto]) -> None:
        self.parent: dict[str, str] = {self._own(node): self._own(node) for node in nodes}
        made: dict[str, str] = {}
        for node in nodes:
            for name in node.output:
                if name:
                    self._join(made.setdefault(name, self._own(node)), self._own(node))
        for node in nodes:
            for name in reads(node):
                if name in made:
                    self._join(made[name], self._own(node))

    def of(self, node: onnx.NodeProto) -> str:
        return self._root(self._own(node))

    def _own(self, node: onnx.NodeProto) -> str:
        return next((name for name in node.output if name), node.name)

    def _join(self, one: str, other: str) -> None:
        self.parent[self._root(one)] = self._root(other)

    def _root(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name
