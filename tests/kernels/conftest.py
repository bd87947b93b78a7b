"""Graphs of one operator of llmc's own, and what a GPU kernel needs in order to be run or compiled without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from llmc.passes.graph import Array, Constant, Graph, Node, Tensor, Variable

OneNode = Callable[..., Graph]


@pytest.fixture(scope="session")
def one_node() -> OneNode:
    """A graph of one node of domain `llmc`: `given` arrays by input, of which all but `inputs` are constants.

    Outputs, name → dtype, have the rank of the first input.
    """

    def one_node(
        operator: str,
        given: Mapping[str, Array],
        outputs: Mapping[str, Any],
        inputs: tuple[str, ...] = ("x",),
        opset: int = 21,
        **attributes: Any,
    ) -> Graph:
        tensors: dict[str, Tensor] = {}
        for name, array in given.items():
            free = ["batch", *array.shape[1:]]
            tensors[name] = Variable(name, array.dtype, free) if name in inputs else Constant(name, array)
        rank = next(iter(given.values())).ndim
        made = [Variable(name, np.dtype(dtype), [None] * rank) for name, dtype in outputs.items()]
        node = Node(operator, "node", attributes, tensors.values(), made, domain="llmc")
        graph = Graph([node], [tensors[name] for name in inputs], made, opset=opset, ir_version=11)
        graph.import_domains = []
        return graph

    return one_node
