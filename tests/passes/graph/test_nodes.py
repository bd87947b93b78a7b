"""Nodes and tensors know each other, whatever is done to the inputs and outputs of a node."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from llmc.passes.graph import Constant, Node, Variable

CHANGES = ("append", "insert", "set", "extend", "pop", "delete", "remove", "clear")


def change(edges: Any, how: str, index: int, tensor: Variable) -> None:
    if how in ("append", "remove"):
        if how == "append" or tensor in edges:
            getattr(edges, how)(tensor)
    elif how == "insert":
        edges.insert(index, tensor)
    elif how == "extend":
        edges.extend([tensor, tensor])
    elif how == "clear":
        edges.clear()
    elif edges:
        position = index % len(edges)
        if how == "set":
            edges[position] = tensor
        elif how == "pop":
            assert edges[position] is edges.pop(position)
        else:
            del edges[position]


@given(
    st.lists(st.integers(0, 3)),
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from(CHANGES), st.integers(0, 5), st.integers(0, 3)), max_size=20),
)
def test_both_sides_of_every_edge_agree(first: list[int], changes: list[tuple[int, str, int, int]]) -> None:
    tensors = [Variable("t") for _ in range(4)]  # one name for all: tensors are equal only to themselves
    nodes = [Node("Max", "n", inputs=[tensors[i] for i in first], outputs=[Variable("t")]), Node("Max", "n")]
    for which, how, index, tensor in changes:
        change(nodes[which].inputs, how, index, tensors[tensor])
    for tensor in tensors:
        read = Counter(id(node) for node in nodes for t in node.inputs if t is tensor)
        assert Counter(map(id, tensor.outputs)) == read
        assert tensor.inputs == []
    assert nodes[0].outputs[0].inputs == [nodes[0]]


def test_a_tensor_becomes_a_constant_where_it_stands() -> None:
    tensor = Variable("a", np.dtype(np.float32), ["batch"])
    node = Node("Abs", inputs=[tensor])
    constant = tensor.to_constant(np.array([1, 2]))
    assert constant is tensor
    assert isinstance(node.inputs[0], Constant)
    assert (constant.dtype, constant.shape, constant.outputs) == (np.int64, (2,), [node])


def test_there_is_no_place_for_what_is_misspelt() -> None:
    with pytest.raises(AttributeError):
        Node("Abs").input = []  # type: ignore[attr-defined]
