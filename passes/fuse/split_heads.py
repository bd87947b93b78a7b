"""Splits queries, keys and values into heads before they are taken apart: one Reshape and one Transpose for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.passes.graph import Graph, Node, Tensor, metadata, rewire
from llmc.passes.match import called
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.rewrite import merged_metadata
from llmc.passes.shapes.dimension import Dimension, Shape
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
    between: tuple[Node, ...]
    """Normalisations and rotations of each head on the way."""
    sizes: tuple[Node, ...]
    """Nodes that read batch and length on the way."""
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
        if not any(_is_split_into_heads(tensor) for tensor in split.outputs):
            return None
        parts = [self._part(tensor) for tensor in split.outputs]
        if len({part.size for part in parts}) > 1:
            sizes = ", ".join(str(part.size) for part in parts)
            raise NotSplitError(f"the parts of {called(split)} have heads of several sizes: {sizes}")
        return parts

    def _part(self, tensor: Tensor) -> Part:
        """The way of [b, s, h·d] to heads, over [b, s, h, d] and [b, s·h, d], and back as often as it likes."""
        flat, sizes = self.dims.of(tensor), list[Node]()
        user = self._only_user(tensor, flat, sizes)
        between: list[Node] = []
        heads = size = None
        if user.op == "RotaryEmbedding" and flat is not None:
            heads = user.attrs.get("num_heads")
            size = None if flat[2].number is None or not heads else flat[2].number // heads
        elif user.op != "Reshape":
            raise NotSplitError(f"'{tensor.name}' goes to {called(user)}, where a Reshape to heads is needed")
        now = flat
        while user.op != "Transpose":
            after = self.dims.of(user.outputs[0])
            if user.op == "Reshape":
                heads, size = (heads, size) if heads else _heads(flat, after)
                if heads is None or size is None or after not in _views(flat, heads, size):
                    raise NotSplitError(f"'{tensor.name}' goes to {called(user)}, where a Reshape to heads is needed")
            elif user.op in NORMS and (now == flat or user.attrs.get("axis", -1) not in (-1, len(now or ()) - 1)):
                raise NotSplitError(f"{called(user)} is over more than each head")
            elif user.op not in (*NORMS, "RotaryEmbedding") or len(user.outputs) > 1:
                raise NotSplitError(f"'{tensor.name}' goes to {called(user)}, where a Transpose of heads is needed")
            elif user.op == "RotaryEmbedding" and (now != flat or user.attrs.get("num_heads") != heads):
                raise NotSplitError(f"{called(user)} turns other heads")
            if user.op != "Reshape":
                between.append(user)
            now, user = after, self._only_user(user.outputs[0], flat, sizes)
        if user.attrs.get("perm") != SPLIT or heads is None or size is None or now != _views(flat, heads, size)[1]:
            raise NotSplitError(f"'{tensor.name}' goes to {called(user)}, where a Transpose of heads is needed")
        return Part(heads, size, tuple(between), tuple(sizes), user)

    def _only_user(self, tensor: Tensor, flat: Shape | None, sizes: list[Node]) -> Node:
        """What reads a tensor, beside nodes that read no more of it than batch and length; these go to `sizes`."""
        shape = self.dims.of(tensor)
        alike = flat is not None and shape is not None and shape[:2] == flat[:2]
        found = [user for user in tensor.outputs if alike and _reads_batch_and_length(user)]
        users = [user for user in tensor.outputs if user not in found]
        if id(tensor) in self.given_back or len(users) != 1:
            raise NotSplitError(f"'{tensor.name}', before it is split into heads, is an output or used twice")
        if users[0].inputs[0] is not tensor or users[0].domain:
            raise NotSplitError(f"'{tensor.name}' goes to {called(users[0])}, where a Reshape to heads is needed")
        sizes.extend(found)
        return users[0]

    def apply(self, split: Node, parts: Sequence[Part]) -> None:
        """Do it."""
        op: Any = Builder(self.graph.opset, self.fresh, split.name)
        rewire([(node, 0, split.inputs[0]) for part in parts for node in part.sizes])
        total = np.array([0, 0, sum(part.heads for part in parts), parts[0].size], dtype=np.int64)
        whole = op.Transpose(op.Reshape(split.inputs[0], total), perm=SPLIT)
        made = op.Split(whole, split=[part.heads for part in parts], axis=1, outputs=len(parts))
        for new in op.nodes:
            metadata(new).update(merged_metadata(split, [split, *(part.transpose for part in parts)]))
        ends = [self._in_heads(op, tensor, part) for tensor, part in zip(made, parts, strict=True)]
        self.placement.early(op.nodes)
        for part, end in zip(parts, ends, strict=True):
            result, maker = part.transpose.outputs[0], end.inputs[0]
            self.placement.remove(part.transpose)
            maker.outputs[next(i for i, t in enumerate(maker.outputs) if t is end)] = result
        self.dims.follow(op.nodes)

    def _in_heads(self, op: Any, tensor: Tensor, part: Part) -> Tensor:
        """What a part's normalisations and rotations make of it, heads before the sequence."""
        for node in part.between:
            attributes = {name: value for name, value in node.attrs.items() if name not in ("num_heads", "axis")}
            if node.op in NORMS:
                attributes["axis"] = -1
            tensor = getattr(op, node.op)(tensor, *node.inputs[1:], **attributes)
            metadata(op.nodes[-1]).update(metadata(node))
        return tensor


def _is_split_into_heads(tensor: Tensor) -> bool:
    """Whether a Reshape reads a tensor, or what RotaryEmbedding makes of it."""
    users = list(tensor.outputs)
    users += [reader for user in users if user.op == "RotaryEmbedding" for reader in user.outputs[0].outputs]
    return any(user.op == "Reshape" for user in users)


def _reads_batch_and_length(node: Node) -> bool:
    """Whether a node reads no more of [b, s, …] than b and s."""
    first, end = node.attrs.get("start", 0), node.attrs.get("end", 3)
    return node.op == "Shape" and not node.domain and first >= 0 and 0 <= end <= 2


def _heads(flat: Shape | None, after: Shape | None) -> tuple[int | None, int | None]:
    """Number and size of the heads that a Reshape of [b, s, h·d] tells apart."""
    if flat is None or after is None or flat[2].number is None or len(after) not in (3, 4) or not after[-1].number:
        return None, None
    return flat[2].number // after[-1].number, after[-1].number


def _views(flat: Shape | None, heads: int, size: int) -> list[Shape]:
    """[b, s, h·d], [b, s, h, d] and [b, s·h, d]."""
    if flat is None:
        return [(), (), ()]
    batch, sequence, _ = flat
    count, width = Dimension.of(heads), Dimension.of(size)
    return [(batch, sequence, count * width), (batch, sequence, count, width), (batch, sequence * count, width)]
