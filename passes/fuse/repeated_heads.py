"""Finds heads of keys and values that were repeated for the queries of a group, so that they can be taken once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.passes.fuse.attention_match import producer
from llmc.passes.graph import Node, Tensor, metadata
from llmc.passes.shapes.dimension import ONE, Shape
from llmc.passes.shapes.dimensions import Dimensions

SPLIT = [0, 2, 1, 3]
"""The order of axes between [batch, heads, sequence, size] and [batch, sequence, heads, size]."""


@dataclass(frozen=True)
class Repeated:
    """A tensor [b, h·n, s, d] in which each head of another stands n times in a row."""

    source: Tensor
    """[b, h, s, d], or [b, s, h, d] where heads come behind the sequence; it may lack axes or have one more."""
    heads: int | None
    """h."""
    count: int
    """n."""
    view: str
    """What gives the source these axes: "Reshape" of [b, s, h·d], "Squeeze" of [b, s, h, 1, d], or "" for nothing."""
    sequence_first: bool
    rotations: tuple[Node, ...]
    """RotaryEmbedding nodes behind it, which turn each head alike, the last one first."""

    @property
    def stands(self) -> bool:
        """Whether the source is a tensor [b, h, s, d] as it stands."""
        return not (self.view or self.sequence_first or self.rotations)

    def make(self, op: Any) -> Tensor:
        """[b, h, s, d], with what stood behind the repetition done to each head once."""
        tensor = self.source
        if self.view == "Reshape":
            tensor = op.Reshape(tensor, np.array([0, 0, self.heads, -1], dtype=np.int64))
        elif self.view == "Squeeze":
            tensor = op.Squeeze(tensor, axes=[3 if self.sequence_first else 2])
        if self.sequence_first:
            tensor = op.Transpose(tensor, perm=SPLIT)
        for rotation in reversed(self.rotations):
            attributes = dict(rotation.attrs)
            if "num_heads" in attributes:
                attributes["num_heads"] = self.heads
            tensor = op.RotaryEmbedding(tensor, *rotation.inputs[1:], **attributes)
            metadata(op.nodes[-1]).update(metadata(rotation))
        return tensor


def repeated(dims: Dimensions, tensor: Tensor, given_back: set[int]) -> Repeated | None:
    """How the heads of a tensor [b, h·n, s, d] were repeated; None where they were not.

    `Reshape(Expand(x [b, h, 1, s, d]))`, or the same of [b, s, h, 1, d] before heads are brought to the front and
    turned by RotaryEmbedding nodes, whose results nothing else reads.
    """
    rotations: list[Node] = []
    node = producer(tensor)
    while node is not None and node.op == "RotaryEmbedding" and not node.domain:
        if len(tensor.outputs) != 1 or id(tensor) in given_back:
            return None
        rotations.append(node)
        tensor = node.inputs[0]
        node = producer(tensor)
    sequence_first = node is not None and node.op == "Transpose" and node.attrs.get("perm") == SPLIT
    if node is not None and sequence_first:
        tensor = node.inputs[0]
    axis = 2 if sequence_first else 1
    found = _expanded(dims, tensor, axis)
    if found is None:
        return None
    expand, single = found
    source, view = _before(dims, expand.inputs[0], single, axis)
    if single[axis].number is None and (view == "Reshape" or rotations):
        return None
    count = (dims.of(expand.outputs[0]) or ())[axis + 1].number or 0
    return Repeated(source, single[axis].number, count, view, sequence_first, tuple(rotations))


def _expanded(dims: Dimensions, tensor: Tensor, axis: int) -> tuple[Node, Shape] | None:
    """The Expand or Tile to [.., h, n, ..] that a Reshape makes [.., h·n, ..] of, and the shape [.., h, ..] before."""
    merge = producer(tensor)
    expand = producer(merge.inputs[0]) if merge is not None and merge.op == "Reshape" else None
    if expand is None or expand.op not in ("Expand", "Tile") or expand.domain:
        return None
    before, after, merged = (dims.of(t) for t in (expand.inputs[0], expand.outputs[0], tensor))
    if before is None or after is None or len(before) != 5 or len(after) != 5:
        return None
    lead, heads, count, rest = after[:axis], after[axis], after[axis + 1], after[axis + 2 :]
    if not count.number or before != (*lead, heads, ONE, *rest) or merged != (*lead, heads * count, *rest):
        return None
    return expand, (*lead, heads, *rest)


def _before(dims: Dimensions, tensor: Tensor, single: Shape, axis: int) -> tuple[Tensor, str]:
    """Where [.., h, 1, ..] comes from, and what gives that the shape [.., h, ..]."""
    node = producer(tensor)
    if node is not None and node.op in ("Unsqueeze", "Reshape") and not node.domain:
        shape = dims.of(node.inputs[0])
        if shape == single:
            return node.inputs[0], ""
        if axis == 2 and shape == (*single[:2], single[2] * single[3]):
            return node.inputs[0], "Reshape"
    return tensor, "Squeeze"
