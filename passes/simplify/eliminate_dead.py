"""The pass `eliminate-dead`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import ClassVar

import onnx

from llmc.passes.base import Context, Pass, PassResult
from llmc.passes.graph import Graph, Node, Tensor, outputs_of_scopes, reads, remove_nodes, scopes

COUNTS_ITS_OUTPUTS = {"BatchNormalization"}
"""Operators that compute something else when they are asked for fewer outputs (training mode before opset 14)."""


class EliminateDead(Pass):
    """Removes nodes, constants and optional outputs that no graph output depends on.

    A node goes when none of its results reaches an output of the graph, through other nodes or through a subgraph
    that captures it; the same inside subgraphs, whose outputs always stay. Constants go with their last reader.
    Trailing outputs that the operator's schema marks optional go when nothing reads them:
    `Dropout(x) → y, mask` becomes `Dropout(x) → y`. Inputs and outputs of the graph never change.

    **Safety:** exact: no operator of ONNX has an effect beside its outputs.

    Source: ONNX IR, "Graphs"; dead code elimination by marking, Cytron et al., 1991.
    """

    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        live = _live_nodes(list(graph.outputs))
        for scope in scopes(graph):
            _remove_dead(scope, live, context, result)
        _drop_outputs(graph, context, result)
        return result


def _live_nodes(tensors: list[Tensor]) -> set[int]:
    """Ids of the nodes that the tensors depend on."""
    live: set[int] = set()
    seen: set[int] = set()
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for node in tensor.inputs:
            if id(node) not in live:
                live.add(id(node))
                pending.extend(node.inputs)
                pending.extend(output for subgraph in node.subgraphs() for output in subgraph.outputs)
    return live


def _remove_dead(scope: Graph, live: set[int], context: Context, result: PassResult) -> None:
    """Remove the scope's dead nodes, users before producers; one that stays lets those stay that it reads."""
    dead = []
    for node in reversed(scope.nodes):
        if id(node) in live:
            continue
        if context.apply(result, "dead-node", node, f"nothing uses {_names(node.outputs)}"):
            dead.append(node)
        else:
            live.update(id(producer) for tensor in reads(node) for producer in tensor.inputs)
            live |= _live_nodes([output for body in node.subgraphs() for output in body.outputs])
    if dead:
        remove_nodes(scope, dead)


def _drop_outputs(graph: Graph, context: Context, result: PassResult) -> None:
    given_back = outputs_of_scopes(graph)
    for scope in scopes(graph):
        for node in scope.nodes:
            unused = list(_unused_optional(node, graph.opset, given_back))
            if not any(tensor.name for tensor in unused):
                continue
            if context.apply(result, "unused-output", node, f"nothing uses {_names(unused)}"):
                for _ in unused:
                    node.outputs.pop()


def _unused_optional(node: Node, opset: int, given_back: set[int]) -> Iterator[Tensor]:
    """The trailing outputs that the node need not have, last first."""
    if node.op in COUNTS_ITS_OUTPUTS:
        return
    optional = _optional_outputs(node.op, node.domain or "", opset)
    for index, tensor in reversed(list(enumerate(node.outputs))):
        if index not in optional or tensor.outputs or id(tensor) in given_back:
            return
        yield tensor


@cache
def _optional_outputs(op: str, domain: str, opset: int) -> frozenset[int]:
    """Positions of the outputs that the operator may be used without; none where ONNX does not define it."""
    if domain not in ("", "ai.onnx") or not onnx.defs.has(op, max_inclusive_version=opset):
        return frozenset()
    outputs = onnx.defs.get_schema(op, max_inclusive_version=opset).outputs
    return frozenset(i for i, o in enumerate(outputs) if o.option == onnx.defs.OpSchema.FormalParameterOption.Optional)


def _names(tensors: list[Tensor]) -> str:
    return ", ".join(f"'{t.name}'" for t in tensors if t.name)
