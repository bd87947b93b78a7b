"""The pass `eliminate-common`."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, ClassVar

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    beginning,
    constant_value,
    constants,
    extra_attributes,
    load_values,
    metadata,
    module_of,
    onnx_dtype,
    outputs_of_scopes,
    raw_blocks,
    raw_values,
    remove_nodes,
    replace_uses,
    scopes,
)

RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
DETERMINISTIC_DOMAINS = {"", "ai.onnx", "ai.onnx.ml"}


class EliminateCommon(Pass):
    """Computes equal things once: merges nodes that do the same to the same tensors, and equal constants.

    Two nodes of one scope are the same when operator, domain, attributes (tensors by their bytes) and inputs are, each
    input at its position: `Clip(x, "", c)` is not `Clip(x, c, "")`. Constants are the same when dtype, shape and bytes
    are; large ones are read only where their first values agree. Outputs of the graph keep their names: where two of
    them are equal, the second becomes `Identity` of the first. Left alone: random operators, Dropout in training,
    nodes with subgraphs, and operators of domains that ONNX does not define.

    **Safety:** exact.

    Source: value numbering, Alpern, Wegman and Zadeck, 1988.
    """

    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        given_back = outputs_of_scopes(graph)
        _merge_constants(graph, given_back, context, result)
        for scope in scopes(graph):
            _Scope(scope, graph.opset, given_back, context, result).merge_nodes()
        return result


def _merge_constants(graph: Graph, given_back: set[int], context: Context, result: PassResult) -> None:
    """Let the first of equal constants stand for all."""
    candidates = [c for c in constants(graph) if id(c) not in given_back and c.dtype.kind != "O"]
    for alike in _groups(candidates, lambda c: (onnx_dtype(c), tuple(c.shape))):
        for similar in _groups(alike, lambda c: beginning(c._values)):
            for first, *others in _groups(similar, _digest):
                for constant in others:
                    detail = f"'{constant.name}' is '{first.name}'"
                    if context.apply(result, "equal-constant", constant.outputs[0], detail):
                        replace_uses(constant, first)


def _groups(constants: Iterable[Constant], key: Callable[[Constant], Hashable]) -> list[list[Constant]]:
    """The constants by key, in order; those that are alone with theirs left out."""
    groups: dict[Hashable, list[Constant]] = defaultdict(list)
    for constant in constants:
        groups[key(constant)].append(constant)
    return [group for group in groups.values() if len(group) > 1]


def _digest(constant: Constant) -> bytes:
    hasher = hashlib.blake2b()
    for block in raw_blocks(constant._values, onnx_dtype(constant)):
        hasher.update(block)
    return hasher.digest()


class _Scope:
    """The nodes of one graph or subgraph, numbered by what they compute."""

    def __init__(self, scope: Graph, opset: int, given_back: set[int], context: Context, result: PassResult) -> None:
        self.scope, self.opset, self.given_back = scope, opset, given_back
        self.context, self.result = context, result
        self.removed: list[Node] = []
        self.identities: dict[int, Node] = {}

    def merge_nodes(self) -> None:
        """One walk in graph order."""
        first_of: dict[Hashable, Node] = {}
        for node in self.scope.nodes:
            key = _key(node)
            first = node if key is None else first_of.setdefault(key, node)
            if first is node:
                continue
            reason = self.why_not(first, node)
            if reason:
                self.result.near_misses.append(NearMiss("equal-node", node.name, reason, module_of(node)))
                continue
            if self.context.apply(self.result, "equal-node", node, f"computes what {_called(first)} does"):
                self.merge(first, node)
        self.finish()

    def why_not(self, first: Node, node: Node) -> str:
        """Why two nodes with one key must stay two; '' where they need not."""
        if (node.domain or "") not in DETERMINISTIC_DOMAINS:
            return f"operators of domain '{node.domain}' may not give the same result twice"
        if node.op in RANDOM or (node.op == "Dropout" and _drops(node, self.opset)):
            return f"{node.op} gives another result each time"
        both = any(self.both_given_back(a, b) for a, b in zip(first.outputs, node.outputs, strict=True))
        if both and (node.op == "Identity" or len(node.outputs) > 1 or node.outputs[0].type_proto is not None):
            return f"it and {_called(first)} both make outputs of the graph"
        return ""

    def both_given_back(self, a: Tensor, b: Tensor) -> bool:
        return id(a) in self.given_back and id(b) in self.given_back

    def merge(self, first: Node, node: Node) -> None:
        """Let the results of `first` stand for those of `node`, under the names of outputs of the graph."""
        self.removed.append(node)
        for index, (a, b) in enumerate(zip(first.outputs, node.outputs, strict=True)):
            if id(b) not in self.given_back:
                replace_uses(b, a)
            elif id(a) not in self.given_back:
                replace_uses(a, b)
                first.outputs[index] = b
            else:
                replace_uses(b, a)
                identity = Node("Identity", node.name, inputs=[a], outputs=[b])
                metadata(identity).update(metadata(node))
                self.identities[id(node)] = identity

    def finish(self) -> None:
        if self.removed:
            self.scope.nodes = [self.identities.get(id(node), node) for node in self.scope.nodes]
            remove_nodes(self.scope, self.removed)


def _key(node: Node) -> Hashable | None:
    """What a node computes, as far as two may be compared; None for a node with a subgraph."""
    attributes = []
    for name, value in sorted(node.attrs.items()):
        if isinstance(value, Graph):
            return None
        attributes.append((name, _frozen(value)))
    inputs = [id(tensor) if tensor.name else None for tensor in node.inputs]
    while inputs and inputs[-1] is None:
        inputs.pop()
    return (
        node.op,
        node.domain or "",
        tuple(attributes),
        tuple(sorted(a.SerializeToString(deterministic=True) for a in extra_attributes(node))),
        tuple(inputs),
        tuple(bool(tensor.name) for tensor in node.outputs),
    )


def _frozen(value: Any) -> Hashable:
    """An attribute's value to compare by: 1 is not 1.0, 0.0 is not -0.0, NaN is itself."""
    if isinstance(value, Constant) and value.dtype.kind == "O":
        return tuple(value.shape), tuple(load_values(value).reshape(-1).tolist())
    if isinstance(value, Constant):
        return onnx_dtype(value), tuple(value.shape), bytes(raw_values(value._values, onnx_dtype(value)))
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return type(value).__name__, repr(value)


def _drops(node: Node, opset: int) -> bool:
    """Whether a Dropout may be in training mode: by attribute before opset 7, never until 11, by input since."""
    if opset < 12:
        return opset < 7
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return False
    training = constant_value(node.inputs[2])
    return training is None or bool(training)


def _called(node: Node) -> str:
    return f"{node.op} '{node.name or node.outputs[0].name}'"
