"""Lets Attention nodes take [batch, sequence, heads · size], so that nothing need split it into heads before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmc.passes.fuse.attention_match import (
    NotAttentionError,
    producer,
    scale_attribute,
    unscaled,
    users_of,
)
from llmc.passes.fuse.repeated_heads import SPLIT, Repeated, repeated
from llmc.passes.graph import Graph, Node, Tensor, metadata, rewire
from llmc.passes.match import called
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.shapes.dimension import Dimension, Shape, product
from llmc.passes.shapes.dimensions import Dimensions

SEQUENCE_FIRST = [2, 0, 1, 3]
"""From [batch, heads, sequence, size] to [sequence, batch, heads, size], as torch.nn.MultiheadAttention has it."""


@dataclass(frozen=True)
class Heads:
    """A tensor [batch, heads, sequence, size], and where it came from."""

    tensor: Tensor
    count: int
    source: Tensor
    """[batch, sequence, heads · size], or [batch, sequence, heads, size] where it was never that."""
    flat: bool
    rotations: tuple[Node, ...] = ()
    """RotaryEmbedding nodes between both, the last one first."""

    @property
    def unscaled(self) -> tuple[Heads, float]:
        """The same before it was multiplied with numbers, which Attention can do as well, and their product."""
        source, factor = unscaled(self.source)
        return replace(self, source=source), factor


@dataclass(frozen=True)
class Plan:
    """What is to be done with one Attention node."""

    inputs: tuple[Heads, Heads, Heads]
    merge: Node
    """The Transpose of its result to [batch, sequence, heads, size], or to [sequence, batch, heads, size]."""
    factor: float
    """What queries and keys were multiplied with before they were split into heads."""

    def describe(self) -> str:
        query, key, _ = self.inputs
        return f"{query.count} heads, {key.count} of keys and values"


class HeadFolder:
    """Folds Reshape and Transpose into the Attention nodes of one scope."""

    def __init__(
        self, graph: Graph, dims: Dimensions, placement: Placement, fresh: Callable[[str], str], given_back: set[int]
    ) -> None:
        self.graph, self.dims, self.placement = graph, dims, placement
        self.fresh, self.given_back = fresh, given_back

    def groups(self, node: Node) -> tuple[Repeated, Repeated] | None:
        """Keys and values as they were before they were repeated for the heads of a group; None where they were not."""
        if _keeps_cache(node):
            return None
        key, value = (repeated(self.dims, tensor, self.given_back) for tensor in node.inputs[1:3])
        return (key, value) if key is not None and value is not None and key.count == value.count else None

    def take_groups(self, node: Node, key: Repeated, value: Repeated) -> None:
        """Let the node read these."""
        makers = [producer(tensor) for tensor in node.inputs[1:3]]
        op = Builder(self.graph.opset, self.fresh, node.name)
        rewire([(node, index, heads.make(op)) for index, heads in ((1, key), (2, value))])
        for new in op.nodes:
            if not metadata(new):
                metadata(new).update(metadata(node))
        self.placement.early(op.nodes)
        self.dims.follow(op.nodes)
        for maker in makers:
            if maker is not None:
                self.placement.remove_unused(maker)

    def plan(self, node: Node) -> Plan | None:
        """What to do; None where it has been done. Raises NotAttentionError with what stands against it."""
        ranks = [None if shape is None else len(shape) for shape in map(self.dims.of, node.inputs[:3])]
        if ranks == [3, 3, 3]:
            return None
        if ranks != [4, 4, 4]:
            raise NotAttentionError("the ranks of its inputs are not known")
        if _keeps_cache(node):
            raise NotAttentionError("it keeps a cache of keys and values, or gives back its scores")
        query, key, value = (self._heads(tensor) for tensor in node.inputs[:3])
        factor = 1.0
        if (self.dims.of(node.inputs[0]) or ())[-1].number is not None:
            (query, of_query), (key, of_key) = query.unscaled, key.unscaled
            factor = of_query * of_key
        return Plan((query, key, value), self._merge(node), factor)

    def _heads(self, tensor: Tensor) -> Heads:
        """Where the heads of a tensor [batch, heads, sequence, size] come from."""
        shape = self.dims.of(tensor)
        heads = shape[1].number if shape is not None and len(shape) == 4 else None
        if heads is None:
            raise NotAttentionError(f"the number of heads of '{tensor.name}' is not known")
        rotations: list[Node] = []
        inner = tensor
        while True:
            node = producer(inner)
            if node is not None and node.op == "RotaryEmbedding" and not node.domain:
                if id(inner) in self.given_back or len(inner.outputs) != 1:
                    raise NotAttentionError(f"the result of {called(node)} is used elsewhere, split into heads")
                rotations.append(node)
            elif node is None or not self._is_same(node):
                break
            inner = node.inputs[0]
        if node is None or node.op != "Transpose" or node.attrs.get("perm") != SPLIT:
            made = called(node) if node is not None else "no node"
            raise NotAttentionError(f"'{inner.name}' comes from {made}, where a Transpose of heads is needed")
        split = node.inputs[0]
        while (maker := producer(split)) is not None and self._is_same(maker):
            split = maker.inputs[0]
        source = producer(split)
        if source is not None and source.op == "Reshape" and self._splits(source):
            return Heads(tensor, heads, source.inputs[0], True, tuple(rotations))
        return Heads(tensor, heads, split, False, tuple(rotations))

    def _is_same(self, node: Node) -> bool:
        """Whether a node gives back what it gets: Identity, or a Reshape or Expand to the shape that was there."""
        if node.op not in ("Identity", "Reshape", "Expand") or node.domain:
            return False
        before, after = self.dims.of(node.inputs[0]), self.dims.of(node.outputs[0])
        return before is not None and before == after

    def _splits(self, node: Node) -> bool:
        """Whether a Reshape makes [b, s, h, d] of [b, s, h · d]."""
        before, after = self.dims.of(node.inputs[0]), self.dims.of(node.outputs[0])
        return before is not None and after is not None and _joined(after) == before

    def _merge(self, node: Node) -> Node:
        """The Transpose to [b, s, h, d] or [s, b, h, d] that alone reads it, behind nodes that change nothing."""
        tensor = node.outputs[0]
        while True:
            users = users_of(tensor)
            if id(tensor) in self.given_back or len(users) != 1:
                raise NotAttentionError(f"'{tensor.name}', split into heads, is an output of the graph or used twice")
            if users[0].op == "Transpose" and users[0].attrs.get("perm") in (SPLIT, SEQUENCE_FIRST):
                return users[0]
            if not self._is_same(users[0]) or users[0].inputs[0] is not tensor:
                raise NotAttentionError(f"its result goes to {called(users[0])}, where a Transpose of heads is needed")
            tensor = users[0].outputs[0]

    def fold(self, node: Node, plan: Plan) -> None:
        """Do it."""
        op = Builder(self.graph.opset, self.fresh, node.name)
        query, key, value = (self._flat(op, heads) for heads in plan.inputs)
        count = plan.inputs[0].count
        attributes = {**node.attrs, "q_num_heads": count, "kv_num_heads": plan.inputs[1].count}
        size = (self.dims.of(plan.inputs[0].tensor) or ())[-1].number
        if plan.factor != 1.0 and size:
            attributes["scale"] = scale_attribute(attributes.get("scale", size**-0.5) * plan.factor, size)
        made = op.Attention(query, key, value, *node.inputs[3:], **attributes)
        made.inputs[0].name = node.name
        if plan.merge.attrs["perm"] == SEQUENCE_FIRST:
            made = op.Transpose(made, perm=[1, 0, 2])
        merged = plan.merge.outputs[0]
        users = users_of(merged)
        as_one = id(merged) not in self.given_back and all(self._reads_flat(user, merged) for user in users)
        if not as_one:
            made = op.Reshape(made, np.array([0, 0, count, -1], dtype=np.int64))
        for new in op.nodes:
            metadata(new).update(metadata(node))
        self.placement.after(node, op.nodes)
        whole = _joined(self.dims.of(merged) or ())
        flat = next((user for user in users if as_one and self.dims.of(user.outputs[0]) == whole), None)
        if as_one:
            rewire([(user, 0, made) for user in users if user is not flat])
        self._take_over(made, plan.merge if flat is None else flat, keep=not as_one or flat is not None)
        self.dims.follow(op.nodes)

    def _take_over(self, made: Tensor, old: Node, keep: bool) -> None:
        """Remove an old node, and what only it needed; `keep` its result, which others know by its name."""
        result = old.outputs[0]
        self.placement.remove(old)
        if keep:
            edges = [(user, index) for user in users_of(made) for index, t in enumerate(user.inputs) if t is made]
            rewire([(user, index, result) for user, index in edges])
            made.inputs[0].outputs[0] = result

    def _reads_flat(self, user: Node, merged: Tensor) -> bool:
        """Whether a node reads [b, s, h, d] only to give it another shape, which it can of [b, s, h · d] too."""
        if user.op != "Reshape" or user.inputs[0] is not merged:
            return False
        target = self.dims.values(user.inputs[1])
        return target is not None and all(
            isinstance(size, Dimension) and (size.number != 0 or axis < 2) for axis, size in enumerate(target)
        )

    def _flat(self, op: Any, heads: Heads) -> Tensor:
        """The tensor as [batch, sequence, heads · size]."""
        tensor = heads.source
        if not heads.flat:
            tensor = op.Reshape(tensor, np.array([0, 0, -1], dtype=np.int64))
        for rotation in reversed(heads.rotations):
            tensor = op.RotaryEmbedding(tensor, *rotation.inputs[1:], **{**rotation.attrs, "num_heads": heads.count})
        return tensor


def _keeps_cache(node: Node) -> bool:
    return len(node.outputs) > 1 or any(not tensor.is_empty() for tensor in node.inputs[4:])


def _joined(shape: Shape) -> Shape:
    """[b, s, h, d] → [b, s, h · d]."""
    return (*shape[:2], product(shape[2:]))
