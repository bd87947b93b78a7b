"""Adds constants to what a product gives, where possible in a bias that is there already."""

from __future__ import annotations

from collections.abc import Callable, Set

import numpy as np

from llmc.passes.graph import Array, Constant, Graph, Node, Tensor, Variable, load_values, metadata, rewire

Names = Callable[[str], str]


def add_bias(graph: Graph, node: Node, values: Array, outputs: Set[int], fresh: Names) -> None:
    """Let MatMul, Gemm, Conv or ConvTranspose `node` give `values` [channels] more, in the type of its result.

    `outputs` are the ids of tensors that the graph gives back.
    """
    if node.op in ("Conv", "ConvTranspose", "Gemm"):
        _into_input(node, values, fresh)
        return
    result = node.outputs[0]
    users = list(result.outputs)
    if len(users) == 1 and users[0].op == "Add" and not users[0].domain and id(result) not in outputs:
        for index, tensor in enumerate(users[0].inputs):
            if isinstance(tensor, Constant) and tuple(tensor.shape) == values.shape:
                rewire([(users[0], index, _sum(tensor, values, fresh))])
                return
    _insert(graph, node, values, fresh)


def _into_input(node: Node, values: Array, fresh: Names) -> None:
    """Gemm's C and the B of a convolution, the third input; Gemm multiplies its C by beta."""
    beta = float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0
    given: Tensor | None = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    if given is None:
        node.attrs.pop("beta", None)
        bias = Constant(fresh(f"{node.name}_bias"), values)
        if len(node.inputs) > 2:
            node.inputs[2] = bias
        else:
            node.inputs.append(bias)
        return
    if not isinstance(given, Constant):
        raise TypeError(f"the bias of {node.name} is not constant: ask bias_is_known first")
    rewire([(node, 2, _sum(given, (values / beta).astype(values.dtype), fresh))])


def _sum(constant: Constant, values: Array, fresh: Names) -> Constant:
    held = load_values(constant)
    total = (held.astype(np.float64) + values).astype(held.dtype)
    return Constant(fresh(f"{constant.name}_corrected"), total)


def _insert(graph: Graph, node: Node, values: Array, fresh: Names) -> None:
    result = node.outputs[0]
    raw = Variable(fresh(f"{result.name}_raw"), result.dtype, result.shape)
    node.outputs[0] = raw
    add = Node("Add", fresh(f"{node.name}/bias"), {}, [raw, Constant(fresh(f"{node.name}_bias"), values)], [result])
    metadata(add).update(metadata(node))
    position = next(i for i, other in enumerate(graph.nodes) if other is node)
    graph.nodes.insert(position + 1, add)


def bias_is_known(node: Node) -> bool:
    """Whether what the product adds already, if anything, is a constant along its channels."""
    if node.op not in ("Conv", "ConvTranspose", "Gemm") or len(node.inputs) < 3 or node.inputs[2].is_empty():
        return True
    given = node.inputs[2]
    return isinstance(given, Constant) and (len(given.shape) == 1 or node.op == "Gemm")
