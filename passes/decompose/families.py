"""Puts what a function builds in the place of single nodes: the ground that `decompose-…` passes stand on.

A `Family` maps operators to functions of a `Site` (the node, and a builder beside it) that give back a tensor for
each of the node's outputs, or raise `StaysError` with the reason why the node has to stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx

from llmc.passes.base import Context, NearMiss, PassResult
from llmc.passes.decompose.node_types import infer_node
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Tensor,
    fresh_names,
    infer_shapes,
    metadata,
    module_of,
    outputs_of_scopes,
    scopes,
    unlink,
)
from llmc.passes.opset import raise_opset
from llmc.passes.pattern import Builder

MICROSOFT = "com.microsoft"


class StaysError(Exception):
    """Why a node cannot be decomposed."""


class NeedsOpsetError(Exception):
    """The graph must be at this opset before the node can be decomposed."""

    def __init__(self, opset: int) -> None:
        super().__init__(opset)
        self.opset = opset


Made: TypeAlias = Tensor | tuple[Tensor | None, ...]
"""What stands for a node's outputs, by position; None for one that nothing uses."""


@dataclass(frozen=True)
class Decomposition:
    """How one operator is spelled out, and the lowest opset that has every operator it is spelled out in."""

    name: str
    build: Callable[[Site], Made]
    opset: int


@dataclass
class Family:
    """Operators that are decomposed alike: (domain, operator) → how."""

    of: dict[tuple[str, str], Decomposition] = field(default_factory=dict)

    def decomposes(
        self, *operators: str, opset: int = 13, domain: str = MICROSOFT
    ) -> Callable[[Callable[[Site], Made]], Callable[[Site], Made]]:
        """Register a function for these operators of one domain."""

        def register(build: Callable[[Site], Made]) -> Callable[[Site], Made]:
            for operator in operators:
                self.of[domain, operator] = Decomposition(operator, build, opset)
            return build

        return register


class TypedBuilder(Builder):
    """A builder whose tensors have the types and shapes that ONNX infers, as far as it can."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        make = super().__getattr__(name)

        def call(*wanted: Any, **options: Any) -> Any:
            made = make(*wanted, **options)
            infer_node(self.nodes[-1], self._opset, overwrite=True)
            return made

        return call

    def constant(self, values: Array) -> Constant:
        return Constant(self._fresh(f"{self._scope}.constant" if self._scope else "constant"), values)


class Site:
    """A node to decompose: its inputs and attributes, and `op`, which makes nodes in its place."""

    def __init__(self, node: Node, op: Any, used: set[int], opset: int, padded: bool = True) -> None:
        self.node, self.op, self.opset, self.padded = node, op, opset, padded
        self.notes: list[str] = []
        """What would have been simpler, and why it is not: near misses of the node that is replaced."""
        self._used = used

    def input(self, index: int) -> Tensor | None:
        """The input at a position; None where it is left out."""
        given = self.node.inputs
        return given[index] if index < len(given) and not given[index].is_empty() else None

    def needed(self, index: int) -> Tensor:
        tensor = self.input(index)
        if tensor is None:
            raise StaysError(f"its input {index} is missing")
        return tensor

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.node.attrs.get(name, default)

    def wants(self, index: int) -> bool:
        """Whether anything uses the output at a position."""
        outputs = self.node.outputs
        return index < len(outputs) and bool(outputs[index].outputs or id(outputs[index]) in self._used)

    def is_output(self, index: int) -> bool:
        """Whether the output at a position is one of the graph."""
        return id(self.node.outputs[index]) in self._used

    def refuse_outputs(self, *indices: int, because: str) -> None:
        for index in indices:
            if self.wants(index):
                raise StaysError(f"'{self.node.outputs[index].name}' is used: {because}")

    def refuse_inputs(self, names: Mapping[int, str]) -> None:
        """Raise StaysError where one of these inputs is given; `names` says what they are."""
        for index, name in names.items():
            if self.input(index) is not None:
                raise StaysError(f"it has {name}, which no standard operator has")

    def refuse_attributes(self, **neutral: Any) -> None:
        """Raise StaysError where an attribute is anything but the value that changes nothing."""
        for name, value in neutral.items():
            found = self.attribute(name, value)
            if found != value:
                raise StaysError(f"its {name} is {found}, which no standard operator has")

    def require(self, opset: int) -> None:
        """Have the graph raised to an opset that this variant of the node needs."""
        if self.opset < opset:
            raise NeedsOpsetError(opset)

    def shape(self, tensor: Tensor) -> list[Any]:
        if tensor.shape is None:
            raise StaysError(f"the rank of '{tensor.name}' is not known")
        return list(tensor.shape)

    def rank(self, tensor: Tensor) -> int:
        return len(self.shape(tensor))

    def size(self, tensor: Tensor, axis: int) -> int:
        """A dimension that must be static."""
        found = self.shape(tensor)[axis]
        if not isinstance(found, int):
            raise StaysError(f"dimension {axis} of '{tensor.name}' is not known")
        return found

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        if tensor.dtype is None:
            raise StaysError(f"the type of '{tensor.name}' is not known")
        dtype: np.dtype[Any] = np.dtype(tensor.dtype)
        return dtype

    def number(self, value: float, like: Tensor) -> Array:
        """A scalar of another tensor's type."""
        return np.asarray(value, dtype=self.dtype(like))


def decompose(
    graph: Graph,
    context: Context,
    families: Sequence[Family],
    refusals: Mapping[str, str] | None = None,
    *,
    padded: bool = True,
) -> PassResult:
    """Decompose every node that one of `families` has, in the graph and its subgraphs.

    `refusals` are operators of com.microsoft that never can be, with the reason. `padded`: sequences of a batch may
    differ in length. The opset is raised where a decomposition needs it, if anything is decomposed.
    """
    known = {key: how for family in families for key, how in family.of.items()}
    result = PassResult()
    if not any(_key(n) in known or n.op in (refusals or {}) for scope in scopes(graph) for n in scope.nodes):
        return result
    blocked: dict[int, str] = {}
    while True:
        infer_shapes(graph)
        result.near_misses.clear()
        run = _Run(graph, context, known, dict(refusals or {}), blocked, result, padded)
        opset = run.walk()
        if opset is None:
            return result
        problem = _raise(graph, opset)
        if problem is not None:
            blocked[opset] = problem


def _raise(graph: Graph, opset: int) -> str | None:
    """`raise_opset`, with operators that ONNX Runtime puts into ONNX's own domain out of the converter's sight."""
    strange = {n.op for scope in scopes(graph) for n in scope.nodes if not n.domain and not onnx.defs.has(n.op)}
    _move(graph, strange, MICROSOFT)
    problem = raise_opset(graph, opset)
    _move(graph, strange, None)
    return problem


def _move(graph: Graph, operators: Collection[str], domain: str | None) -> None:
    for scope in scopes(graph):
        for node in scope.nodes:
            if node.op in operators:
                node.domain = domain


def _key(node: Node) -> tuple[str, str]:
    return ("" if node.domain in (None, "ai.onnx") else node.domain, node.op)


@dataclass
class _Run:
    graph: Graph
    context: Context
    known: dict[tuple[str, str], Decomposition]
    refusals: dict[str, str]
    blocked: dict[int, str]
    """Opset → why the graph cannot be raised to it."""
    result: PassResult
    padded: bool

    def walk(self) -> int | None:
        """Decompose what can be at this opset; the opset that the graph must be raised to before going on, or None."""
        self.fresh = fresh_names(self.graph)
        self.given_back = outputs_of_scopes(self.graph)
        for scope in scopes(self.graph):
            done: list[Node] = []
            for index, node in enumerate(scope.nodes):
                try:
                    built = self.node(node)
                except NeedsOpsetError as error:
                    scope.nodes = [*done, *scope.nodes[index:]]
                    return error.opset
                done.extend(built)
            scope.nodes = done
        return None

    def node(self, node: Node) -> list[Node]:
        """What stands in the node's place: itself, as a rule."""
        how = self.known.get(_key(node))
        if how is None:
            if node.domain == MICROSOFT and node.op in self.refusals:
                self.miss(node, node.op, self.refusals[node.op])
            infer_node(node, self.graph.opset)
            return [node]
        builder = TypedBuilder(max(self.graph.opset, how.opset), self.fresh, node.name)
        try:
            site = Site(node, builder, self.given_back, self.graph.opset, self.padded)
            made = how.build(site)
            if self.graph.opset < how.opset:
                raise NeedsOpsetError(how.opset)
        except (StaysError, NeedsOpsetError) as error:
            for built in builder.nodes:
                unlink(built)
            if isinstance(error, NeedsOpsetError) and error.opset not in self.blocked:
                raise
            self.miss(node, how.name, self.blocked[error.opset] if isinstance(error, NeedsOpsetError) else str(error))
            return [node]
        if not self.context.apply(self.result, how.name, node):
            for built in builder.nodes:
                unlink(built)
            return [node]
        for note in site.notes:
            self.miss(node, how.name, note)
        return _take_over(node, builder, made if isinstance(made, tuple) else (made,))

    def miss(self, node: Node, rule: str, reason: str) -> None:
        self.result.near_misses.append(NearMiss(rule, node.name, reason, module_of(node)))


def _take_over(node: Node, builder: TypedBuilder, made: Sequence[Tensor | None]) -> list[Node]:
    """Let the tensors that were built be the node's outputs, under the names that these have."""
    taken: set[int] = set()
    replaced = []
    for old, new in zip(node.outputs, made, strict=False):
        if new is None or not old.name:
            continue
        fresh = not isinstance(new, Constant) and any(new.inputs and new.inputs[0] is n for n in builder.nodes)
        if not fresh or id(new) in taken:
            new = builder.Identity(new)
        taken.add(id(new))
        replaced.append((old, new))
    unlink(node)
    for old, new in replaced:
        producer = new.inputs[0]
        producer.outputs[next(i for i, t in enumerate(producer.outputs) if t is new)] = old
        for user in list(new.outputs):
            for index, tensor in enumerate(user.inputs):
                if tensor is new:
                    user.inputs[index] = old
        if new.dtype is not None:
            old.dtype = new.dtype
        if old.shape is None:
            old.shape = new.shape
    for made_node in builder.nodes:
        metadata(made_node).update(metadata(node))
    return builder.nodes
