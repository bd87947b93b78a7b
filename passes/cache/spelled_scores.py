"""Follows attention that is spelled out in products and a Softmax: along the cache it computes with scores.

Scores of tokens that are not there yet are made -inf before the Softmax, so that their weights are 0, and the product
with the values adds nothing for them. Further columns behind the scores, as attention sinks are, may join the Softmax.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmc.passes.graph import Node, Tensor
from llmc.passes.match import attribute
from llmc.passes.shapes.dimension import Dimension
from llmc.passes.shapes.dimensions import Dimensions

Edge = tuple[Node, int]
FLOATS = {np.dtype(np.float32), np.dtype(np.float16)}
"""Types that have -inf, and that the CPU verifies."""


class SpelledScores:
    """What is known of scores in a graph whose caches hold `total` tokens after the run."""

    def __init__(self, dims: Dimensions, total: Dimension) -> None:
        self._dims, self._total = dims, total
        self.hidden: list[Edge] = []
        """Inputs whose last axis has to be -inf from token `total` on."""
        self.further: dict[int, int] = {}
        """By id of a tensor, how many columns it has behind those of the cache."""
        self._low: set[int] = set()
        self._zero: set[int] = set()

    def take(self, node: Node, grown: Mapping[int, list[int]]) -> bool:
        """Whether a node is a part of attention; `grown` has the axes along the cache of its inputs, by position."""
        first = node.inputs[0]
        match node.op:
            case "Cast" | "Identity" if id(first) in self._zero and id(first) not in self.further:
                self._zero.add(id(node.outputs[0]))
                return True
            case "MatMul":
                return self._product(node, grown)
            case "Concat":
                return self._further(node, grown)
            case "Softmax" if first.dtype in FLOATS and self._is_last(node, grown, node.attrs.get("axis", -1)):
                if id(first) not in self._low:
                    self.hidden.append((node, 0))
                self._zero.add(id(node.outputs[0]))
                self._inherit(node)
                return True
            case "ReduceMax":
                (axis,) = attribute(node, "axes") or (None,)
                return id(first) in self._low and axis is not None and self._is_last(node, grown, axis)
            case "Sub" if id(first) in self._low and list(grown) == [0]:
                self._low.add(id(node.outputs[0]))
                self._inherit(node)
                return True
            case "Slice" if id(first) in self._zero and id(first) in self.further:
                return self._without_further(node)
        return False

    def _product(self, node: Node, grown: Mapping[int, list[int]]) -> bool:
        """Scores of queries and keys, or weights times values."""
        ranks = [len(self._dims.of(tensor) or ()) for tensor in node.inputs]
        if min(ranks) < 2:
            return False
        summed = [ranks[i] - axis in grown.get(i, ()) for i, axis in enumerate((1, 2))]
        further = any(id(tensor) in self.further for tensor in node.inputs)
        return not further and (not any(summed) or (all(summed) and id(node.inputs[0]) in self._zero))

    def _further(self, node: Node, grown: Mapping[int, list[int]]) -> bool:
        """Columns behind the scores."""
        shapes = [self._dims.of(tensor) for tensor in node.inputs]
        if not self._is_last(node, grown, node.attrs["axis"]) or None in shapes or id(node.inputs[0]) in self.further:
            return False
        sizes = [shape[-1].number for shape in shapes[1:] if shape]
        if None in sizes or node.inputs[0].dtype not in FLOATS:
            return False
        self.hidden.append((node, 0))
        self._low.add(id(node.outputs[0]))
        self.further[id(node.outputs[0])] = sum(size for size in sizes if size is not None)
        return True

    def _without_further(self, node: Node) -> bool:
        """A Slice that leaves the columns of the cache."""
        before, after = self._dims.of(node.inputs[0]) or (), self._dims.of(node.outputs[0]) or ()
        ends = self._dims.integers(node.inputs[2]) if len(node.inputs) > 2 else None
        if before[:-1] != after[:-1] or after[-1] != self._total or ends != [-self.further[id(node.inputs[0])]]:
            return False
        self._zero.add(id(node.outputs[0]))
        return True

    def _is_last(self, node: Node, grown: Mapping[int, list[int]], axis: int) -> bool:
        """Whether `axis` is the last one, and of the first input alone the one along the cache."""
        last = len(self._dims.of(node.inputs[0]) or ()) - 1
        return dict(grown) == {0: [last]} and axis in (last, -1)

    def _inherit(self, node: Node) -> None:
        if id(node.inputs[0]) in self.further:
            self.further[id(node.outputs[0])] = self.further[id(node.inputs[0])]

    def length(self, tensor: Tensor) -> Dimension:
        """How long an axis of the tensor along the cache is."""
        return self._total + Dimension.of(self.further.get(id(tensor), 0))
