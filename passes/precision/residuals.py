"""Residual connections of convolutional nets: Adds of a convolution's result and what went past it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from llmc.passes.base import NearMiss
from llmc.passes.graph import Constant, Graph, Node, Tensor, module_of
from llmc.passes.precision.insert_qdq import Inserter
from llmc.passes.precision.products import is_operator
from llmc.passes.precision.qdq import producer

RULE = "QuantizeInt8"
Apply = Callable[[str, Node, str], bool]
"""Asks to do one rewrite: rule, node, detail."""


@dataclass(frozen=True)
class Residual:
    """An Add, and the ways to see one of its inputs as a convolution's result: (that Conv, position of the other)."""

    node: Node
    ways: tuple[tuple[Node, int], ...]
    attention: str
    """A node before it that multiplies two activations, as attention does; '' where there is none."""


def residuals(graph: Graph) -> list[Residual]:
    """In graph order. Both inputs are computed; at least one comes straight from a Conv."""
    behind = _behind_attention(graph)
    return [
        Residual(node, ways, behind.get(id(node), ""))
        for node in graph.nodes
        if is_operator(node, {"Add", "Sum"}) and len(node.inputs) == 2 and (ways := tuple(_ways(node)))
    ]


def _ways(node: Node) -> Iterator[tuple[Node, int]]:
    if any(isinstance(tensor, Constant) for tensor in node.inputs):
        return
    for position, tensor in enumerate(node.inputs):
        conv = producer(tensor, "Conv")
        if conv is not None:
            yield conv, 1 - position


def _behind_attention(graph: Graph) -> dict[int, str]:
    """id of each node that uses, however far back, a product of two activations → the name of that."""
    found: dict[int, str] = {}
    for node in graph.nodes:
        earlier = [found[id(maker)] for tensor in node.inputs for maker in tensor.inputs if id(maker) in found]
        if earlier:
            found[id(node)] = earlier[0]
        elif _multiplies_activations(node):
            found[id(node)] = node.name
    return found


def _multiplies_activations(node: Node) -> bool:
    if is_operator(node, {"Attention"}):
        return True
    return is_operator(node, {"MatMul", "Einsum"}) and not any(map(_is_constant, node.inputs))


def _is_constant(tensor: Tensor) -> bool:
    """Whether nothing that is computed from the graph's inputs makes it."""
    todo: list[Tensor] = [tensor]
    while todo:
        last = todo.pop()
        if isinstance(last, Constant):
            continue
        if not last.inputs or not last.inputs[0].inputs:
            return False
        todo += last.inputs[0].inputs
    return True


def share(
    graph: Graph, inserter: Inserter, quantized: Collection[int], refusals: Mapping[int, str], apply: Apply
) -> list[NearMiss]:
    """Let residual Adds read the pairs that convolutions before them read; why others do not.

    `quantized` are the ids of nodes that read pairs, `refusals` say which Adds are not wanted. The rewrite is done
    where `apply` answers True.
    """
    place = {id(node): index for index, node in enumerate(graph.nodes)}
    misses = []
    for found in residuals(graph):
        node = found.node
        shared = [
            position
            for conv, position in found.ways
            if id(conv) in quantized
            and (reader := inserter.readers.get(id(node.inputs[position]))) is not None
            and place[id(reader)] < place[id(node)]
        ]
        reason = refusals.get(id(node)) or _reason(found, quantized, bool(shared))
        if reason is not None:
            misses.append(NearMiss(RULE, node.name, reason, module_of(node)))
            continue
        tensor = node.inputs[shared[0]]
        if apply(RULE, node, f"adds '{tensor.name}' as '{inserter.readers[id(tensor)].name}' reads it"):
            inserter.reuse(node, shared[0])
    return misses


def _reason(found: Residual, quantized: Collection[int], shared: bool) -> str | None:
    if found.attention:
        return f"it stands behind '{found.attention}': only residuals of convolutional nets are quantized"
    ways = [(conv, position) for conv, position in found.ways if id(conv) in quantized]
    if not ways:
        return f"its convolution '{found.ways[0][0].name}' is not quantized"
    if not shared:
        names = " or ".join(f"'{found.node.inputs[position].name}'" for _, position in ways)
        return f"no layer before it reads {names} as int8: to quantize it here would save nothing"
    return None
