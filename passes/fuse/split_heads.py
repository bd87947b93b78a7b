"""Splits queries, keys and values into heads before they are taken apart: one Reshape and one Transpose for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.passes.graph import Graph, Node, Tensor, metadata
from llmc.passes.match import called
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.rewrite import merged_metadata
from llmc.passes.shapes.dimensions import Dimensions

SPLIT = [0, 2, 1, 3]
"""The order of axes between [batch, sequence, heads, size] and [batch, heads, sequence, size]."""
NORMS = ("LayerNormalization", "RMSNormalization")


class NotSplitError(Exception):
    """The first thing that keeps a part from being split into heads with the others."""


@dataclass(frozen=True)
class Part:
    """One output of a Split, on its way to heads."""

    heads: int
    size: int
    norms: tuple[Node, ...]
    """Normalisations of each head between its Reshape and its Transpose."""
    transpose: Node


class HeadSplitter:
    """Takes parts apart along the heads where a graph takes them apart along the last axis."""

    def __init__(
        self, graph: Graph, dims: Dimensions, placement: Placement, fresh: Callable[[str], str], given_back: set[int]
    ) -> None:
        self.graph, self.dims, self.placement = graph, dims, placement
        self.fresh, self.given_back = fresh, given_back

    def parts(self, split: Node) -> list[Part] | None:
        """The parts of `Split(x)`, x [b, s, Σ h·d], each [b, h, s, d] in the end; None where none is split into heads.

        Raises NotSplitError where only some are, or not all alike.
        """
        shape = self.dims.of(split.inputs[0])
        if shape is None or len(shape) != 3 or split.attrs.get("axis", 0) % 3 != 2 or len(split.outputs) < 2:
            return None
        if not any(user.op == "Reshape" for tensor in split.outputs for user in tensor.outputs):
            return None
        parts = [self._part(tensor) for tensor in split.outputs]
        if len({part.size for part in parts}) > 1:
            sizes = ", ".join(str(part.size) for part in parts)
            raise NotSplitError(f"the parts of {called(split)} have heads of several sizes: {sizes}")
        return parts

    def _part(self, tensor: Tensor) -> Part:
        reshape = self._only_user(tensor)
        before, after = self.dims.of(tensor), self.dims.of(reshape.outputs[0])
        if reshape.op != "Reshape" or before is None or after is None or len(after) != 4 or after[:2] != before[:2]:
            raise NotSplitError(f"'{tensor.name}' goes to {called(reshape)}, where a Reshape to heads is needed")
        heads, size = after[2].number, after[3].number
        if heads is None or size is None:
            raise NotSplitError(f"the number of heads of '{tensor.name}' is not known")
        norms: list[Node] = []
        user = self._only_user(reshape.outputs[0])
        while user.op in NORMS and user.inputs[0] in (norms[-1].outputs if norms else reshape.outputs):
            if user.attrs.get("axis", -1) not in (-1, 3) or len(user.outputs) > 1:
                raise NotSplitError(f"{called(user)} is over more than each head")
            norms.append(user)
            user = self._only_user(user.outputs[0])
        if user.op != "Transpose" or user.attrs.get("perm") != SPLIT:
            raise NotSplitError(f"'{tensor.name}' goes to {called(user)}, where a Transpose of heads is needed")
        return Part(heads, size, tuple(norms), user)

    def _only_user(self, tensor: Tensor) -> Node:
        if id(tensor) in self.given_back or len(tensor.outputs) != 1:
            raise NotSplitError(f"'{tensor.name}', before it is split into heads, is an output or used twice")
        return tensor.outputs[0]

    def apply(self, split: Node, parts: Sequence[Part]) -> None:
        """Do it."""
        op: Any = Builder(self.graph.opset, self.fresh, split.name)
        total = np.array([0, 0, sum(part.heads for part in parts), parts[0].size], dtype=np.int64)
        whole = op.Transpose(op.Reshape(split.inputs[0], total), perm=SPLIT)
        made = op.Split(whole, split=[part.heads for part in parts], axis=1, outputs=len(parts))
        for new in op.nodes:
            metadata(new).update(merged_metadata(split, [split, *(part.transpose for part in parts)]))
        ends = [self._normalised(op, tensor, part) for tensor, part in zip(made, parts, strict=True)]
        self.placement.early(op.nodes)
        for part, end in zip(parts, ends, strict=True):
            result, maker = part.transpose.outputs[0], end.inputs[0]
            self.placement.remove(part.transpose)
            maker.outputs[next(i for i, t in enumerate(maker.outputs) if t is end)] = result
        self.dims.follow(op.nodes)

    def _normalised(self, op: Any, tensor: Tensor, part: Part) -> Tensor:
        """What a part's normalisations make of it, heads before the sequence."""
        for norm in part.norms:
            tensor = getattr(op, norm.op)(tensor, *norm.inputs[1:], **norm.attrs)
            metadata(op.nodes[-1]).update(metadata(norm))
        return tensor
