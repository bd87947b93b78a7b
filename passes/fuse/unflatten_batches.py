"""Finds what is computed on [batch·heads, …] between Reshapes that merge and split these, and does it on both axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from llmc.passes.graph import Constant, Graph, Node, Tensor, metadata
from llmc.passes.match import called
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.rewrite import merged_metadata
from llmc.passes.shapes.dimension import ONE, Shape
from llmc.passes.shapes.dimensions import Dimensions

ELEMENT_BY_ELEMENT = {"Cast", "Identity", "Tanh"}
WITH_A_NUMBER = {"Div", "Mul"}
SUMS = {"Add", "Sub"}


class NotUnflattenedError(Exception):
    """The first thing that keeps batch and heads on one axis."""


@dataclass(frozen=True)
class Part:
    """A tensor [batch·heads, m, n] and how it comes to [batch, heads, m, n]."""

    how: Literal["merged", "row", "number", "other", "made"]
    """What a Reshape merged is taken from before it, a row with an axis that it lacks there; a number stays; another
    is split by a Reshape of its own, to `sizes`."""
    tensor: Tensor
    parts: tuple[Part, ...] = ()
    sizes: tuple[int, ...] = ()
    """[-1, heads, m, n]; none where they are those of the Reshape that goes."""

    @property
    def has_product(self) -> bool:
        return (self.how == "made" and self.tensor.inputs[0].op == "MatMul") or any(p.has_product for p in self.parts)


class BatchUnflattener:
    """Takes the Reshapes of one scope away that split [batch·heads, …] behind products of what others merged."""

    def __init__(
        self, graph: Graph, dims: Dimensions, placement: Placement, fresh: Callable[[str], str], given_back: set[int]
    ) -> None:
        self.graph, self.dims, self.placement = graph, dims, placement
        self.fresh, self.given_back = fresh, given_back

    def find(self, split: Node) -> Part | None:
        """What a Reshape to [batch, heads, m, n] splits; None where no product is. Raises NotUnflattenedError."""
        merged, whole = self.dims.of(split.inputs[0]), self.dims.of(split.outputs[0])
        if merged is None or whole is None or not _merges(whole, merged):
            return None
        part = self._part(split.inputs[0], whole)
        return part if part.has_product else None

    def replace(self, split: Node, part: Part) -> None:
        op = Builder(self.graph.opset, self.fresh, "")
        made = self._make(op, split, part)
        self.placement.after(split, op.nodes)
        result = split.outputs[0]
        self.placement.remove(split)
        made.inputs[0].outputs[0] = result
        self.dims.follow(op.nodes)

    def _part(self, tensor: Tensor, whole: Shape) -> Part:
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or node.domain:
            raise NotUnflattenedError(f"'{tensor.name}' was not merged from batch and heads")
        if node.op == "Reshape":
            before, after = self.dims.of(node.inputs[0]), self.dims.of(tensor)
            if before is None or after is None or before[:2] != whole[:2]:
                raise NotUnflattenedError(f"{called(node)} does not merge batch and heads")
            if _merges((*before[:2], ONE, *before[2:]), after):
                return Part("row", tensor)
            if not _merges(before, after):
                raise NotUnflattenedError(f"{called(node)} does not merge batch and heads")
            return Part("merged", tensor)
        if len(tensor.outputs) != 1 or id(tensor) in self.given_back:
            raise NotUnflattenedError(f"'{tensor.name}', on one axis for batch and heads, is used elsewhere too")
        if node.op in SUMS and not any(_is_number(t) for t in node.inputs):
            return Part("made", tensor, self._summands(node, whole))
        if node.op in (WITH_A_NUMBER | SUMS) and any(_is_number(t) for t in node.inputs):
            return Part(
                "made",
                tensor,
                tuple(Part("number", t) if _is_number(t) else self._part(t, whole) for t in node.inputs),
            )
        if node.op in ELEMENT_BY_ELEMENT or node.op == "MatMul" or self._stays_in_batch(node):
            return Part("made", tensor, tuple(self._part(t, whole) for t in node.inputs))
        raise NotUnflattenedError(f"{called(node)} is not known to work on batch and heads apart")

    def _stays_in_batch(self, node: Node) -> bool:
        """Whether a Transpose leaves the first axis, or a Softmax is over the last."""
        if node.op == "Softmax":
            return node.attrs.get("axis", -1 if self.graph.opset >= 13 else 1) in (-1, 2)
        return node.op == "Transpose" and (node.attrs.get("perm") or [2])[0] == 0

    def _summands(self, node: Node, whole: Shape) -> tuple[Part, ...]:
        """The operands of a sum, of which one at least is unflattened, and others are split for it."""
        shape, problems, parts = self.dims.of(node.outputs[0]), list[NotUnflattenedError](), list[Part]()
        for tensor in node.inputs:
            self._check_summand(tensor, shape, node)
            try:
                parts.append(self._part(tensor, whole))
            except NotUnflattenedError as problem:
                problems.append(problem)
                parts.append(self._other(tensor, whole))
        if len(problems) == len(parts):
            raise problems[0]
        return tuple(parts)

    def _check_summand(self, tensor: Tensor, shape: Shape | None, node: Node) -> None:
        """Whether an operand has batch and heads on its first axis, and rows and columns of the sum, or one of them."""
        own = self.dims.of(tensor)
        known = shape is not None and own is not None and len(own) == len(shape) == 3 and own[0] == shape[0]
        if not known or any(n not in (ONE, wanted) for n, wanted in zip(own or (), shape or (), strict=True)):
            raise NotUnflattenedError(f"'{tensor.name}' may not have the shape of what {called(node)} makes")

    def _other(self, tensor: Tensor, whole: Shape) -> Part:
        """What was not merged from batch and heads, and is split into these."""
        own = self.dims.of(tensor) or ()
        if _merges(whole, own):
            return Part("other", tensor)
        sizes = [size.number for size in (whole[1], *own[1:])]
        if not all(sizes):
            raise NotUnflattenedError(f"how to split '{tensor.name}' would have to be computed in each run")
        return Part("other", tensor, sizes=(-1, *(size or 0 for size in sizes)))

    def _make(self, op: Builder, split: Node, part: Part) -> Any:
        if part.how == "number":
            return part.tensor
        node = part.tensor.inputs[0]
        if part.how == "merged":
            return node.inputs[0]
        if part.how == "row":
            made = op.Unsqueeze(node.inputs[0], axes=[2])
        elif part.how == "other" and part.sizes:
            made, node = op.Reshape(part.tensor, np.array(part.sizes, dtype=np.int64)), split
        elif part.how == "other":
            made, node = op.Reshape(part.tensor, split.inputs[1], **split.attrs), split
        else:
            attributes = dict(node.attrs)
            if node.op == "Softmax":
                attributes["axis"] = 3
            elif node.op == "Transpose":
                attributes["perm"] = [0, *(axis + 1 for axis in node.attrs["perm"])]
            made = getattr(op, node.op)(*(self._make(op, split, p) for p in part.parts), **attributes)
        metadata(op.nodes[-1]).update(merged_metadata(node, [node]))
        return made


def _merges(apart: Shape, merged: Shape) -> bool:
    """Whether [batch·heads, m, n] is [batch, heads, m, n] with its first axes merged."""
    return len(apart) == 4 and len(merged) == 3 and merged == (apart[0] * apart[1], *apart[2:])


def _is_number(tensor: Tensor) -> bool:
    return isinstance(tensor, Constant) and prod(tensor.shape) == 1 and len(tensor.shape) <= 3
