"""Where a graph multiplies activations with constant matrices, whatever way round they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np

from llmc.passes.graph import Array, Constant, Graph, Node, Tensor, load_values, scopes
from llmc.passes.precision.qdq import producer

PRODUCTS = ("MatMul", "Gemm")
FLOATS = (np.dtype(np.float32), np.dtype(np.float16))


@dataclass(frozen=True)
class WeightSite:
    """A MatMul or Gemm with one constant factor of two axes or more."""

    node: Node
    position: int
    """Of the weight among the node's inputs; the activation is the other of the first two."""
    depth_axis: int
    """The axis of the weight that is summed over, from 0."""
    channel_axis: int
    """The axis of the weight that its output channels run along, from 0."""

    @property
    def weight(self) -> Constant:
        return cast(Constant, self.node.inputs[self.position])

    @property
    def activation(self) -> Tensor:
        found: Tensor = self.node.inputs[1 - self.position]
        return found

    @property
    def activation_axis(self) -> int:
        """The axis of the activation that is summed over, from the end."""
        flag = self.node.attrs.get("transB" if self.position == 0 else "transA", 0)
        return -2 if (self.position == 0) != bool(flag) else -1

    @property
    def depth(self) -> int:
        return int(self.weight.shape[self.depth_axis])

    def matrix(self) -> Array:
        """The weight's values as [rows, depth], each row what one output channel multiplies; contiguous."""
        return np.ascontiguousarray(self.view())

    def view(self) -> Array:
        """The same in whatever order: of a weight of two axes nothing is copied."""
        values: Array = np.moveaxis(load_values(self.weight), self.depth_axis, -1).reshape(-1, self.depth)
        return values

    def shaped(self, rows: Array) -> Array:
        """[rows, n] → the weight's own axes, with n along the one that is summed over."""
        others = [size for axis, size in enumerate(self.weight.shape) if axis != self.depth_axis]
        return np.ascontiguousarray(np.moveaxis(rows.reshape(*others, rows.shape[-1]), -1, self.depth_axis))


def weight_sites(graph: Graph) -> Iterator[tuple[Node, WeightSite | str]]:
    """Every MatMul and Gemm in graph order, with its weight, or why it has none that can be rounded by itself."""
    for scope in scopes(graph):
        for node in scope.nodes:
            if node.op in PRODUCTS and node.domain in (None, "", "ai.onnx"):
                yield node, _site(node) if scope is graph else "it stands inside a subgraph"


def _site(node: Node) -> WeightSite | str:
    factors = node.inputs[:2]
    if any(producer(tensor, "DequantizeLinear") for tensor in factors):
        return "quantized already"
    held = [position for position, tensor in enumerate(factors) if isinstance(tensor, Constant)]
    if not held:
        return "it multiplies two activations, or a weight that is computed: fold-constants makes those constants"
    if len(held) == 2:
        return "both its factors are constant: fold-constants makes it one"
    (position,) = held
    weight = factors[position]
    if np.dtype(weight.dtype) not in FLOATS:
        return f"its weight is {np.dtype(weight.dtype)}; integers take the place of float32 and float16"
    rank = len(weight.shape)
    if rank < 2:
        return "its weight is a vector"
    transposed = bool(node.attrs.get("transB" if position else "transA", 0))
    depth, channel = (rank - 2, rank - 1) if (position == 1) != transposed else (rank - 1, rank - 2)
    return WeightSite(node, position, depth, channel)
