"""The pass `inline-control-flow`."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Tensor,
    Variable,
    constant_value,
    constants,
    fresh_names,
    module_of,
    remove_nodes,
    replace_uses,
    scopes,
)
from llmc.passes.pattern import ATTRIBUTE_BECAME_INPUT
from llmc.passes.simplify.local_rules import StaysError
from llmc.passes.simplify.substitute import may_rename, substitute

NEVER, ONCE = "runs never", "runs once"
SCAN_STAYS = "a Scan is not unrolled: it would be a copy of its body for each element, and hold for one length alone"


class InlineControlFlow(Pass):
    """Puts the body of an If or a Loop in its place, where it is known before any run what it will do.

    If with a constant condition → the nodes of the branch that is taken. Loop that ends before its first iteration (0
    trips, or a condition that is false from the start) → its initial values. Loop of exactly one iteration (1 trip and
    a condition that is true at the start, or a body whose own condition is the constant false) → the nodes of its body
    on the initial values; a tensor [d, ...] that the iterations would stack is Unsqueeze(tensor, 0) [1, d, ...]. The
    other branch is dropped. Nodes get fresh names where another scope has theirs. Again inside what was inlined.

    Left alone: Loop that runs more often, or stacks the results of no iteration (their shape is not known). So is Scan:
    it runs once for each element of an axis; unrolled it would be that many copies of its body, in a graph that holds
    for one length alone. TensorRT makes a loop of it as it stands (seen with TensorRT-RTX 1.7, its length symbolic).

    **Safety:** exact.

    Source: ONNX operators If-25 and Loop-25.
    """

    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:
        inliner = _Inliner(graph, context)
        pending = deque([graph])
        while pending:
            scope = pending.popleft()
            inliner.inline_in(scope)
            pending.extend(subgraph for node in scope.nodes for subgraph in node.subgraphs())
        return inliner.result


class _Inliner:
    """One run of the pass."""

    def __init__(self, graph: Graph, context: Context) -> None:
        self.context, self.result = context, PassResult()
        self.opset = graph.opset
        self.fresh = fresh_names(graph)
        self.given_back = Counter(id(tensor) for scope in scopes(graph) for tensor in scope.outputs)
        self.tensor_names = Counter(_tensor_names(graph))
        self.node_names = Counter(node.name for scope in scopes(graph) for node in scope.nodes)

    def inline_in(self, scope: Graph) -> None:
        """Inline what can be in one scope, and in what that brings to it."""
        made = {id(tensor) for node in scope.nodes for tensor in node.outputs}
        kept: list[Node] = []
        removed: list[Node] = []
        pending = deque(scope.nodes)
        while pending:
            node = pending.popleft()
            brought = self.inlined(node, made)
            if brought is None:
                kept.append(node)
            else:
                removed.append(node)
                pending.extendleft(reversed(brought))
        if removed:
            scope.nodes = kept
            remove_nodes(scope, removed)

    def inlined(self, node: Node, made: set[int]) -> list[Node] | None:
        """The nodes to put in a node's place; None for one that stays."""
        if node.domain not in (None, "", "ai.onnx"):
            return None
        if node.op == "Scan":
            self.result.near_misses.append(NearMiss("inline", node.name, SCAN_STAYS, module_of(node)))
        if node.op not in ("If", "Loop"):
            return None
        try:
            detail = _branch(node) if node.op == "If" else self.iterations(node)
        except StaysError as refusal:
            self.result.near_misses.append(NearMiss("inline", node.name, str(refusal), module_of(node)))
            return None
        if detail is None or not self.context.apply(self.result, "inline", node, detail):
            return None
        if node.op == "If":
            body = node.attrs[detail]
            return self.bring(node, body, list(body.outputs), made)
        if detail == NEVER:
            return self.stand_for(node, node.inputs[2:], made)
        return self.first_iteration(node, made)

    def iterations(self, node: Node) -> str | None:
        """How often a Loop runs, where that is never or once; None where it is not known. Raises StaysError."""
        body: Graph = node.attrs["body"]
        trips, condition = _number(node, 0), _number(node, 1)
        carried = max(len(node.inputs) - 2, 0)
        if condition == 0 or (trips is not None and trips <= 0):
            stacked = [t for t in node.outputs[carried:] if t.outputs or id(t) in self.given_back]
            if stacked:
                raise StaysError(f"it runs never, and the shape of '{stacked[0].name}' is not known")
            return NEVER
        starts = condition == 1 or (condition is None and _left_out(node, 1))
        stops = condition == 1 and (trips is not None or _left_out(node, 0)) and _is_false(body.outputs[0])
        if not starts or not (trips == 1 or stops):
            if trips is not None:
                raise StaysError(f"it may run {int(trips)} times")
            return None
        for tensor in body.inputs:
            if self.given_back[id(tensor)] > sum(output is tensor for output in body.outputs):
                raise StaysError(f"a subgraph of it gives back '{tensor.name}' as it is")
        return ONCE

    def first_iteration(self, node: Node, made: set[int]) -> list[Node]:
        """The body of a Loop on its initial values; what the iterations would stack gets a first dimension of 1."""
        body: Graph = node.attrs["body"]
        number = Constant(self.fresh(f"{body.inputs[0].name}"), _like(body.inputs[0], np.int64(0)))
        condition = Constant(self.fresh(f"{body.inputs[1].name}"), _like(body.inputs[1], np.bool_(True)))
        actual = dict(zip(map(id, body.inputs), (number, condition, *node.inputs[2:]), strict=True))
        results = [actual.get(id(tensor), tensor) for tensor in body.outputs[1:]]
        for tensor in body.inputs:
            replace_uses(tensor, actual[id(tensor)])
        carried = max(len(node.inputs) - 2, 0)
        stacks = [self.stack(tensor) for tensor in results[carried:]]
        body.nodes.extend(stacks)
        return self.bring(node, body, [*results[:carried], *(n.outputs[0] for n in stacks)], made)

    def stack(self, tensor: Tensor) -> Node:
        name = self.fresh(f"{tensor.name}_stacked")
        out = Variable(name, dtype=tensor.dtype)
        if self.opset < ATTRIBUTE_BECAME_INPUT["Unsqueeze"]["axes"][1]:
            return Node("Unsqueeze", name, {"axes": [0]}, [tensor], [out])
        axes = Constant(self.fresh(f"{name}_axes"), np.array([0], dtype=np.int64))
        return Node("Unsqueeze", name, inputs=[tensor, axes], outputs=[out])

    def bring(self, node: Node, body: Graph, results: Sequence[Tensor], made: set[int]) -> list[Node]:
        """The nodes of a body, taken out of it, named apart from all others, and making the node's outputs."""
        nodes = list(body.nodes)
        body.nodes = []
        self.given_back.subtract(id(tensor) for tensor in body.outputs)
        self.given_back = +self.given_back
        for inner in nodes:
            if inner.name and self.node_names[inner.name] > 1:
                inner.name = self.fresh(inner.name)
            for tensor in inner.outputs:
                made.add(id(tensor))
                if tensor.name and self.tensor_names[tensor.name] > 1:
                    tensor.name = self.fresh(tensor.name)
        return [*nodes, *self.stand_for(node, results, made)]

    def stand_for(self, node: Node, results: Sequence[Tensor], made: set[int]) -> list[Node]:
        """Let `results` be the outputs of a node; the Identity nodes that outputs of the graph may need."""
        renamed: dict[int, Tensor] = {}
        identities = []
        for old, result in zip(list(node.outputs), results, strict=False):
            if old.is_empty():
                continue
            new = renamed.get(id(result), result)
            if id(old) in self.given_back and may_rename(new, self.given_back, made):
                renamed[id(result)] = old
            identity = substitute(old, new, self.given_back, made, node)
            if identity is not None:
                identities.append(identity)
        return identities


def _tensor_names(graph: Graph) -> Iterator[str]:
    """The name of every tensor that a scope of the graph makes or is given, as often as one has it."""
    for scope in scopes(graph):
        yield from (tensor.name for tensor in scope.inputs)
        yield from (tensor.name for node in scope.nodes for tensor in node.outputs)
    yield from (constant.name for constant in constants(graph))


def _number(node: Node, index: int) -> float | None:
    """The value of a constant input with one element; None for any other, and for one that is left out."""
    value = constant_value(node.inputs[index]) if index < len(node.inputs) else None
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


def _left_out(node: Node, index: int) -> bool:
    return bool(index >= len(node.inputs) or node.inputs[index].is_empty())


def _branch(node: Node) -> str | None:
    """The attribute that holds the branch which an If takes in every run."""
    condition = _number(node, 0)
    return None if condition is None else "then_branch" if condition else "else_branch"


def _is_false(tensor: Tensor) -> bool:
    value = constant_value(tensor)
    return value is not None and value.size == 1 and not value.reshape(-1)[0]


def _like(tensor: Tensor, value: Any) -> Array:
    """The value in the rank, 0 or 1, that a body declares for it."""
    return np.full((1,) * len(tensor.shape or ()), value)
