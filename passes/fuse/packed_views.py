"""Follows tensors that only move, cut and regroup the axes of another, and says how to make them anew in few nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from llmc.passes.graph import Array, Node, Tensor
from llmc.passes.shapes.dimension import ONE, Dimension, Shape
from llmc.passes.shapes.dimensions import Dimensions

COLUMN = -1
SAME_ELEMENTS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
PICKS = {"Gather", "GatherND", "Slice", "Split"}
"""Operators that take a part of a tensor along one axis."""


@dataclass(frozen=True)
class View:
    """A tensor that is made of x [..., columns]: which columns it takes, and where its axes come from.

    `axes`: for each axis the factors that it is the product of, outermost first: i for axis i of x, COLUMN for the
    next axis of `columns`. `columns` [m, n, …], int64: the column that stands there.
    """

    axes: tuple[tuple[int, ...], ...]
    columns: Array

    @staticmethod
    def whole(shape: Shape) -> View | None:
        """x itself; None where the number of its columns is not known."""
        width = shape[-1].number
        if width is None:
            return None
        return View((*((axis,) for axis in range(len(shape) - 1)), (COLUMN,)), np.arange(width))

    def in_order(self, order: Sequence[int]) -> View:
        """The same of an x whose axes but the last stand in this order."""
        axes = [tuple(f if f == COLUMN else order.index(f) for f in axis) for axis in self.axes]
        return View(tuple(axes), self.columns)

    @property
    def order(self) -> list[int]:
        """The axes of x but for its columns, in the order in which they come."""
        return [factor for axis in self.axes for factor in axis if factor != COLUMN]

    def transposed(self, perm: Sequence[int]) -> View:
        numbers = iter(range(self.columns.ndim))
        places = [[next(numbers) for factor in axis if factor == COLUMN] for axis in self.axes]
        order = [place for axis in perm for place in places[axis]]
        return View(tuple(self.axes[axis] for axis in perm), self.columns.transpose(order))

    def reshaped(self, x: Shape, after: Shape) -> View | None:
        """The same elements as a tensor of shape `after`; None where that cuts through an axis of x."""
        pending: list[tuple[int, Dimension]] = []
        widths = iter(self.columns.shape)
        for factor in (factor for axis in self.axes for factor in axis):
            size = Dimension.of(next(widths)) if factor == COLUMN else x[factor]
            if factor != COLUMN or size != ONE:
                pending.append((factor, size))
        axes: list[tuple[int, ...]] = []
        sizes: list[int] = []
        for wanted in after:
            group: list[int] = []
            rest = wanted
            while pending and (rest != ONE or (not group and pending[0][1] == ONE)):
                factor, size = pending.pop(0)
                quotient = rest.over(size)
                if quotient is None:
                    taken = size.over(rest) if factor == COLUMN and rest.number else None
                    if taken is None:
                        return None
                    pending.insert(0, (COLUMN, taken))
                    size, quotient = rest, ONE
                group.append(factor)
                rest = quotient
                if factor == COLUMN:
                    sizes.append(size.number or 0)
            if rest != ONE:
                return None
            axes.append(tuple(group))
        return None if pending else View(tuple(axes), self.columns.reshape(sizes))

    def picked(self, axis: int, indices: Array | slice) -> View | None:
        """What these places along one axis hold, or one place, without the axis; None where the axis is one of x."""
        if self.axes[axis] != (COLUMN,):
            return None
        place = sum(factor == COLUMN for before in self.axes[:axis] for factor in before)
        columns = self.columns[(slice(None),) * place + (indices,)]
        kept = (*self.axes[:axis], *([(COLUMN,)] if columns.ndim == self.columns.ndim else []), *self.axes[axis + 1 :])
        return View(kept, columns)


@dataclass(frozen=True)
class Step:
    """A Reshape to these sizes, or a Transpose to this order."""

    sizes: Shape = ()
    perm: tuple[int, ...] = ()


def steps(view: View, x: Shape) -> list[Step]:
    """How a tensor with the view's axes is made of one that has the view's columns in their order: [..., columns]."""
    lead, widths, number = len(x) - 1, view.columns.shape, iter(range(len(x) - 1, len(x) + view.columns.ndim))
    size = [*x[:-1], *(Dimension.of(width) for width in widths)]
    numbered = [[next(number) if factor == COLUMN else factor for factor in axis] for axis in view.axes]
    groups = [[factor for factor in group if factor < lead or size[factor] != ONE] for group in numbered]
    kept = [factor for factor, n in enumerate(size) if factor < lead or n != ONE]
    after = dict(pairwise([*kept, -1]))
    runs: list[list[list[int]]] = [[] for _ in groups]
    for run, group in zip(runs, groups, strict=True):
        breaks = [index for index, (a, b) in enumerate(pairwise(group), 1) if b != after[a]]
        run += [group[start:end] for start, end in pairwise([0, *breaks, len(group)])] if group else []
    flat = [run for axis in runs for run in axis]
    natural = sorted(flat)
    final = tuple(_product([size[i] for i in group]) for group in groups)
    found = []
    now = (*x[:-1], Dimension.of(prod(widths)))
    perm = tuple(natural.index(run) for run in flat)
    if perm != tuple(range(len(flat))):
        apart = tuple(_product([size[i] for i in run]) for run in natural)
        if len(natural) != lead + 1 or apart != now:
            found.append(Step(sizes=apart))
        found.append(Step(perm=perm))
        now = tuple(apart[index] for index in perm)
    return [*found, Step(sizes=final)] if now != final else found


def make(op: Any, tensor: Tensor, shape: Shape, plan: Sequence[Step]) -> Tensor:
    """Do the steps to a tensor of this shape."""
    for step in plan:
        if step.perm:
            tensor, shape = op.Transpose(tensor, perm=list(step.perm)), tuple(shape[axis] for axis in step.perm)
        else:
            tensor, shape = op.Reshape(tensor, np.array(target(shape, step.sizes), dtype=np.int64)), step.sizes
    return tensor


def target(before: Shape, after: Shape) -> list[int] | None:
    """What a Reshape from one shape to another is told; None where that would have to be computed."""
    told = []
    for axis, size in enumerate(after):
        copied = axis < len(before) and before[axis] == size
        told.append(size.number if size.number is not None else 0 if copied else -1)
    return told if told.count(-1) < 2 and all(size.number != 0 for size in after) else None


def can_make(shape: Shape, plan: Sequence[Step]) -> bool:
    """Whether every Reshape of the steps can be told its shape."""
    for step in plan:
        if step.perm:
            shape = tuple(shape[axis] for axis in step.perm)
        elif target(shape, step.sizes) is None:
            return False
        else:
            shape = step.sizes
    return True


def moved(node: Node, view: View, x: Shape, dims: Dimensions) -> View | None:
    """The view that a node makes of its first input, whose view is given; None where it does more than that."""
    after = dims.of(node.outputs[0])
    if node.op == "Transpose":
        return view.transposed(node.attrs.get("perm") or list(range(len(view.axes)))[::-1])
    return view.reshaped(x, after) if node.op in SAME_ELEMENTS and after is not None else None


def parts(node: Node, view: View, dims: Dimensions) -> list[View | None]:
    """For each output of a node that picks parts of its first input the view that it is; None for one that is not."""
    rank = len(view.axes)
    if node.op in ("Gather", "GatherND"):
        return [_gathered(node, view, dims)]
    if node.op == "Slice":
        return [_sliced(node, view, dims)]
    axis, start, found = node.attrs.get("axis", 0) % rank, 0, list[View | None]()
    for output in node.outputs:
        shape = dims.of(output)
        width = shape[axis].number if shape is not None else None
        if width is None:
            return [None] * len(node.outputs)
        found.append(view.picked(axis, slice(start, start + width)))
        start += width
    return found


def _gathered(node: Node, view: View, dims: Dimensions) -> View | None:
    numbers, shape = dims.integers(node.inputs[1]), dims.of(node.inputs[1])
    if numbers is None or shape is None or node.attrs.get("batch_dims", 0):
        return None
    if node.op == "GatherND":
        axis, one_axis = 0, len(shape) == 2 and shape[1] == ONE
    else:
        axis, one_axis = node.attrs.get("axis", 0) % len(view.axes), len(shape) < 2
    if not one_axis or view.axes[axis] != (COLUMN,):
        return None
    place = sum(factor == COLUMN for before in view.axes[:axis] for factor in before)
    if not all(-view.columns.shape[place] <= n < view.columns.shape[place] for n in numbers):
        return None
    return view.picked(axis, np.array(numbers if shape else numbers[0]))


def _sliced(node: Node, view: View, dims: Dimensions) -> View | None:
    def told(name: str, position: int, default: list[int]) -> list[int] | None:
        if name in node.attrs:
            return list(node.attrs[name])
        given = len(node.inputs) > position and not node.inputs[position].is_empty()
        return dims.integers(node.inputs[position]) if given else default

    starts, ends = told("starts", 1, []), told("ends", 2, [])
    axes = told("axes", 3, list(range(len(starts or ()))))
    strides = told("steps", 4, [1] * len(starts or ()))
    if starts is None or ends is None or axes is None or strides is None:
        return None
    found: View | None = view
    for axis, *bounds in zip(axes, starts, ends, strides, strict=True):
        found = found.picked(axis % len(view.axes), slice(*bounds)) if found is not None else None
    return found


def _product(sizes: Sequence[Dimension]) -> Dimension:
    return Dimension.of(1) if not sizes else sizes[0] * _product(sizes[1:])
