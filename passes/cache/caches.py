"""Finds the caches of a decoder: keys or values of earlier tokens that go in, and come out with the new ones behind."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.passes.cache.static_cache import AXIS
from llmc.passes.graph import Graph, Node, Tensor, Variable, rewire

SCATTER = "TensorScatter"


@dataclass(frozen=True)
class Cache:
    """Keys or values of one layer: `present` is `past` with `new` behind it, or of a static cache written into it."""

    node: Node
    past: Tensor
    new: Tensor
    present: Tensor


def growing_caches(graph: Graph) -> list[Cache]:
    """Those that a Concat or an Attention makes longer, in graph order."""
    return _inputs_to_outputs(graph, [cache for node in graph.nodes for cache in _grown(node)])


def static_caches(graph: Graph) -> list[Cache]:
    """Those that a TensorScatter writes into, in graph order."""
    nodes = (node for node in graph.nodes if node.op == SCATTER and not node.domain)
    return _inputs_to_outputs(graph, [Cache(n, n.inputs[0], n.inputs[1], n.outputs[0]) for n in nodes])


def _grown(node: Node) -> list[Cache]:
    if node.domain:
        return []
    if node.op == "Concat" and len(node.inputs) == 2 and node.attrs["axis"] in (AXIS, AXIS - 4):
        return [Cache(node, node.inputs[0], node.inputs[1], node.outputs[0])]
    if node.op == "Attention" and len(node.inputs) > 5 and len(node.outputs) > 2:
        return [Cache(node, node.inputs[i + 3], node.inputs[i], node.outputs[i]) for i in (1, 2)]
    return []


def _inputs_to_outputs(graph: Graph, caches: list[Cache]) -> list[Cache]:
    inputs, outputs = {id(t) for t in graph.inputs}, {id(t) for t in graph.outputs}
    return [c for c in caches if id(c.past) in inputs and id(c.present) in outputs and len(c.past.shape or ()) == 4]


def read_cache(node: Node, mask: Tensor | None) -> None:
    """Let an Attention that kept its cache itself read it, and a mask, which says all that `is_causal` said."""
    node.attrs.pop("is_causal", None)
    presents = node.outputs[1:3]
    list.__delitem__(node.outputs, slice(1, None))
    for tensor in presents:
        list.__setitem__(tensor.inputs, slice(None), [made for made in tensor.inputs if made is not node])
    while len(node.inputs) < 4:
        list.append(node.inputs, Variable.empty())
    rewire([(node, index, tensor) for index, tensor in enumerate(presents, 1)])
    rewire([(node, 3, mask)] if mask is not None else [])
    rewire([(node, index, Variable.empty()) for index in range(4, len(node.inputs))])
    list.__delitem__(node.inputs, slice(4, None))
