"""Questions about a graph, and changes of its edges, in linear time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import cast

from llmc.passes.graph.tensors import (
    Array,
    Constant,
    Graph,
    Node,
    Tensor,
    loaded,
    numpy_dtype,
    onnx_dtype,
    stored_bytes,
)


def scopes(graph: Graph) -> list[Graph]:
    """The graph and its subgraphs, outer ones before inner ones."""
    found = [graph]
    for scope in found:
        found.extend(v for node in scope.nodes if node.attrs for v in node.attrs.values() if isinstance(v, Graph))
    return found


def operators(graph: Graph) -> set[str]:
    """The operators that the graph and its subgraphs have, of any domain."""
    return {node.op for scope in scopes(graph) for node in scope.nodes}


def outputs_of_scopes(graph: Graph) -> set[int]:
    """The ids of the tensors that the graph or a subgraph gives back."""
    return {id(tensor) for scope in scopes(graph) for tensor in scope.outputs}


def reads(node: Node) -> Iterator[Tensor]:
    """What a node reads: its inputs, and what its subgraphs capture of the scopes around them."""
    yield from (tensor for tensor in node.inputs if tensor.name)
    inner = [scope for subgraph in node.subgraphs() for scope in scopes(subgraph)]
    own = {id(t) for scope in inner for t in (*scope.inputs, *(t for n in scope.nodes for t in n.outputs))}
    for scope in inner:
        for tensor in (*(t for n in scope.nodes for t in n.inputs), *scope.outputs):
            if tensor.name and id(tensor) not in own:
                yield tensor


def load_values(constant: Constant) -> Array:
    """The values; unlike `Constant.values` it does not make the constant hold them in memory from then on."""
    return loaded(constant._values)


def fresh_names(graph: Graph) -> Callable[[str], str]:
    """A function that makes names for nodes and tensors which nothing in the graph or its subgraphs has yet."""
    taken: set[str] = set()

    def fresh(wanted: str) -> str:
        if not taken:
            taken.update(_names(graph))
        return free_name(wanted, taken)

    return fresh


def _names(graph: Graph) -> Iterator[str]:
    """The names of all nodes and tensors, '' among them."""
    yield ""
    for scope in scopes(graph):
        yield from (t.name for t in (*scope.inputs, *scope.outputs))
        for node in scope.nodes:
            yield node.name
            yield from (t.name for t in (*node.inputs, *node.outputs))


def free_name(wanted: str, taken: set[str]) -> str:
    """`wanted`, or with the first number behind it that makes a name not in `taken`; then it is."""
    name = wanted
    if name in taken:
        name = next(n for n in (f"{wanted}_{i}" for i in itertools.count(1)) if n not in taken)
    taken.add(name)
    return name


def replace_uses(old: Tensor, new: Tensor) -> None:
    """Let every node that reads `old` read `new`; outputs of graphs stay. Linear in the number of uses."""
    users = {id(node): node for node in old.outputs}
    list.clear(old.outputs)
    for node in users.values():
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                list.__setitem__(node.inputs, index, new)
                list.append(new.outputs, node)


def rewire(edges: Iterable[tuple[Node, int, Tensor]]) -> None:
    """Let each node read the given tensor at the given position. Linear in the edges of the tensors that it touches."""
    left: dict[int, Tensor] = {}
    for node, index, tensor in edges:
        left[id(node.inputs[index])] = node.inputs[index]
        list.__setitem__(node.inputs, index, tensor)
        list.append(tensor.outputs, node)
    for tensor in left.values():
        users = {id(node): node for node in tensor.outputs}.values()
        list.__setitem__(tensor.outputs, slice(None), [n for n in users for read in n.inputs if read is tensor])


def remove_nodes(scope: Graph, nodes: Iterable[Node]) -> None:
    """Take nodes, with their subgraphs, out of one scope. Linear in the scope and in what the nodes touch."""
    gone: dict[int, Node] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        gone[id(node)] = node
        pending.extend(inner for subgraph in node.subgraphs() for inner in subgraph.nodes)
    touched = {id(t): t for node in gone.values() for t in (*node.inputs, *node.outputs)}
    for tensor in touched.values():
        for edges in (tensor.inputs, tensor.outputs):
            list.__setitem__(edges, slice(None), [n for n in edges if id(n) not in gone])
    for node in gone.values():
        list.clear(node.inputs)
        list.clear(node.outputs)
    scope.nodes = [node for node in scope.nodes if id(node) not in gone]


def unlink(node: Node) -> None:
    """Take a node's edges away, comparing by identity (graphsurgeon's own lists compare nodes by content, slowly)."""
    for tensor in node.inputs:
        _drop(tensor.outputs, node)
    for tensor in node.outputs:
        _drop(tensor.inputs, node)
    list.clear(node.inputs)
    list.clear(node.outputs)


def _drop(nodes: list[Node], node: Node) -> None:
    for index, candidate in enumerate(nodes):
        if candidate is node:
            list.__delitem__(nodes, index)
            return


def constant_source(tensor: Tensor) -> Constant | None:
    """The constant that a tensor is, or is an Identity or Cast of; None for any other tensor. Loads nothing."""
    while not isinstance(tensor, Constant):
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is None or producer.domain or producer.op not in ("Identity", "Cast"):
            return None
        tensor = producer.inputs[0]
    return tensor


def constant_value(tensor: Tensor) -> Array | None:
    """The value of a tensor that is constant, seen through Identity and Cast nodes; None for any other."""
    if isinstance(tensor, Constant):
        return cast(Array, tensor.values)
    producer = tensor.inputs[0] if tensor.inputs else None
    if producer is None or producer.domain or producer.op not in ("Identity", "Cast"):
        return None
    value = constant_value(producer.inputs[0])
    if value is None or producer.op == "Identity":
        return value
    return value.astype(numpy_dtype(producer.attrs["to"]))


def constants(graph: Graph) -> Iterator[Constant]:
    """Every constant that the graph or a subgraph uses, once each, in order of first use."""
    seen: set[int] = set()
    for scope in scopes(graph):
        for tensor in (*(t for node in scope.nodes for t in node.inputs), *scope.outputs):
            if isinstance(tensor, Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def constant_bytes(constant: Constant) -> int:
    """Bytes that the constant's values take in a file."""
    return stored_bytes(onnx_dtype(constant), prod(constant.shape))
