"""Weights that are equal, or each other's transpose, stored once."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

import numpy as np

from llmc.passes.base import Context, PassResult
from llmc.passes.graph import (
    SMALL,
    Array,
    Constant,
    Graph,
    Node,
    Variable,
    constant_bytes,
    constants,
    fresh_names,
    load_values,
    metadata,
    outputs_of_scopes,
    replace_uses,
)


def share_equal(graph: Graph, context: Context, result: PassResult) -> None:
    """Let the first of equal matrices stand for all, and its Transpose for those that are its transpose.

    Matrices are constants with two axes of `SMALL` bytes or more; outputs of the graph are left alone.
    """
    fresh, given_back = fresh_names(graph), outputs_of_scopes(graph)
    first: dict[str, Constant] = {}
    turned: dict[int, Variable] = {}
    for constant in _twins(c for c in constants(graph) if id(c) not in given_back):
        values = load_values(constant)
        same, across = (first.get(digest_of(v)) for v in (values, values.T))
        user = constant.outputs[0]
        if same is not None:
            if context.apply(result, "EqualWeight", user, f"'{constant.name}' is '{same.name}'"):
                replace_uses(constant, same)
        elif across is None:
            first[digest_of(values)] = constant
        elif context.apply(result, "TransposedWeight", user, f"'{constant.name}' is the transpose of '{across.name}'"):
            if id(across) not in turned:
                turned[id(across)] = _transposed(graph, across, user, fresh(f"{across.name}_transposed"))
            replace_uses(constant, turned[id(across)])


def _twins(found: Iterable[Constant]) -> list[Constant]:
    """The matrices among them that have another one of the same type and shape, or of the shape of their transpose."""
    groups: dict[tuple[object, tuple[int, ...]], list[Constant]] = {}
    for constant in found:
        if len(constant.shape) == 2 and constant.outputs and constant_bytes(constant) >= SMALL:
            groups.setdefault((constant.dtype, tuple(sorted(constant.shape))), []).append(constant)
    return [constant for group in groups.values() if len(group) > 1 for constant in group]


def digest_of(values: Array) -> str:
    """SHA-256 of the type, shape and bytes of an array."""
    digest = sha256(f"{values.shape}{values.dtype}".encode())
    digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _transposed(graph: Graph, constant: Constant, user: Node, name: str) -> Variable:
    """What a Transpose of the constant gives, at the head of the graph, where all scopes see it."""
    made = Variable(name, constant.dtype, constant.shape[::-1])
    node = Node("Transpose", name, {"perm": [1, 0]}, [constant], [made])
    metadata(node).update(metadata(user))
    graph.nodes.insert(0, node)
    return made
