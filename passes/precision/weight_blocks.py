"""Products with weights that are dequantized in blocks: what passes share that give them an operator of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from llmc.passes.base import Context, NearMiss, PassResult
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Tensor,
    fresh_names,
    load_values,
    module_of,
    outputs_of_scopes,
    scopes,
)
from llmc.passes.placement import Placement
from llmc.passes.precision.qdq import producer


def fuse_products(
    graph: Graph,
    context: Context,
    rule: str,
    problem_of: Callable[[Node, Node], str | None],
    fused: Callable[[Node, Node, Callable[[str], str]], Node],
) -> PassResult:
    """Put `fused` in the place of each product with a weight in blocks that `problem_of` has nothing against.

    Both get the product and its DequantizeLinear; `fused` a maker of new names too, and takes over the results.
    """
    result = PassResult()
    fresh, given_back = fresh_names(graph), outputs_of_scopes(graph)
    for scope in scopes(graph):
        placement = Placement(scope, given_back)
        for node in list(scope.nodes):
            dequantize = dequantized_weight(node)
            if dequantize is None:
                continue
            problem = problem_of(node, dequantize)
            if problem is not None:
                result.near_misses.append(NearMiss(rule, node.name, problem, module_of(node)))
            elif context.apply(result, rule, node, f"'{dequantize.inputs[0].name}'"):
                placement.after(node, [fused(node, dequantize, fresh)])
                placement.remove(node)
        placement.finish()
    return result


def dequantized_weight(node: Node) -> Node | None:
    """The DequantizeLinear of constants in blocks that a product has as its second factor."""
    if node.op not in ("MatMul", "Gemm") or node.domain:
        return None
    found = producer(node.inputs[1], "DequantizeLinear")
    if found is None or not all(isinstance(tensor, Constant) for tensor in found.inputs):
        return None
    return found if found.attrs.get("block_size", 0) else None


def bias_of(node: Node) -> Tensor | None:
    given = node.inputs[2] if node.op == "Gemm" and len(node.inputs) > 2 else None
    return None if given is None or given.is_empty() else given


class WeightBlocks:
    """A weight dequantized in blocks along the axis that is summed, as a row for each output channel."""

    def __init__(self, node: Node, dequantize: Node) -> None:
        self.levels, self.scale, *rest = (cast(Constant, tensor).copy() for tensor in dequantize.inputs)
        self.zero = rest[0] if rest else None
        self.transposed = is_transposed(node)
        self.block: int = dequantize.attrs["block_size"]
        depth, rows = self.levels.shape[::-1] if self.transposed else self.levels.shape
        self.depth, self.rows = int(depth), int(rows)

    def scales(self) -> Array:
        """[rows, blocks]."""
        return self.by_rows(load_values(self.scale))

    def by_rows(self, values: Array) -> Array:
        """Values laid out as the weight or its scales are, a row for each output channel."""
        return np.ascontiguousarray(values if self.transposed else values.T)


def is_transposed(node: Node) -> bool:
    """Whether the rows of a product's second factor are its output channels."""
    return node.op == "Gemm" and bool(node.attrs.get("transB", 0))


def problem_of_axis(node: Node, dequantize: Node) -> str | None:
    """Why a product's weight is no WeightBlocks."""
    levels, axis = dequantize.inputs[0], dequantize.attrs.get("axis", 1)
    if len(levels.shape) != 2:
        return f"its weight has {len(levels.shape)} axes"
    if axis % 2 != int(is_transposed(node)):
        return "the blocks of its weight do not run along the axis that is summed"
    return None
