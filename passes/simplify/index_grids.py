"""Finds gathers that take everything in order: exporters write `x[batch_index, index]` where they mean x itself."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.passes.graph import Node, Tensor
from llmc.passes.match import attribute
from llmc.passes.shapes.dimension import ONE, Dimension, Shape, product
from llmc.passes.shapes.dimensions import Dimensions

ZERO = Dimension.of(0)
FAR = 16
"""Nodes between an index and the Ranges that it is made of, at most."""


@dataclass(frozen=True)
class Grid:
    """An integer tensor whose elements are `offset` + Σ `steps`[k] · (position along axis k)."""

    steps: Shape
    offset: Dimension


def taken_whole(dims: Dimensions, node: Node) -> Tensor | None:
    """What has the elements of a node's result, all of them in their order; None where nothing is known to.

    The data of a Gather or GatherND that takes everything; the updates of a ScatterND that replaces everything.
    """
    data, indices = node.inputs[:2]
    before, shape = dims.of(data), dims.of(indices)
    if before is None or shape is None:
        return None
    if node.op == "ScatterND":
        replaced = node.attrs.get("reduction", "none") == "none" and _is_identity(dims, indices, before, shape)
        return node.inputs[2] if replaced and dims.of(node.inputs[2]) == before else None
    if node.op == "GatherND":
        return data if _is_identity(dims, indices, before, shape) and not node.attrs.get("batch_dims", 0) else None
    if node.attrs.get("axis", 0) != 0 or not before or before[0].number is not None:
        return None
    grid = _grid(dims, indices)
    wanted = tuple(ZERO if size == ONE else product(shape[axis + 1 :]) for axis, size in enumerate(shape))
    return data if grid == Grid(wanted, ZERO) and product(shape) == before[0] else None


def _is_identity(dims: Dimensions, indices: Tensor, before: Shape, shape: Shape) -> bool:
    """Whether indices [..., rank] are the positions of all elements, one after the other."""
    node = indices.inputs[0] if indices.inputs else None
    if node is None or node.op != "Concat" or node.attrs["axis"] % len(shape) != len(shape) - 1:
        return False
    longer = [axis for axis, size in enumerate(shape[:-1]) if size != ONE]
    if len(node.inputs) != len(before) or [shape[axis] for axis in longer] != [n for n in before if n != ONE]:
        return False
    axes = iter(longer)
    for size, part in zip(before, node.inputs, strict=True):
        axis = next(axes) if size != ONE else None
        steps = tuple(ONE if k == axis else ZERO for k in range(len(shape)))
        if dims.of(part) != (*shape[:-1], ONE) or _grid(dims, part) != Grid(steps, ZERO):
            return False
    return True


def _grid(dims: Dimensions, tensor: Tensor, far: int = FAR) -> Grid | None:
    shape, values = dims.of(tensor), dims.values(tensor)
    if shape is None or far == 0:
        return None
    if values is not None and len(values) == 1 and isinstance(values[0], Dimension):
        return Grid((ZERO,) * len(shape), values[0])
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.domain:
        return None
    if node.op == "Range":
        start, _, step = (dims.integers(t) for t in node.inputs)
        return Grid((ONE,), ZERO) if (start, step) == ([0], [1]) else None
    inner = [_grid(dims, t, far - 1) for t in node.inputs[: 2 if node.op in ("Add", "Mul") else 1]]
    if any(grid is None for grid in inner):
        return None
    grids = [_aligned(grid, len(shape)) for grid in inner if grid is not None]
    if node.op == "Unsqueeze":
        new = {axis % len(shape) for axis in attribute(node, "axes") or ()}
        steps = iter(inner[0].steps if inner[0] is not None else ())
        return Grid(tuple(ZERO if axis in new else next(steps) for axis in range(len(shape))), grids[0].offset)
    if node.op in ("Cast", "Identity", "Expand"):
        return grids[0]
    if node.op == "Slice":
        return grids[0] if dims.of(node.inputs[0]) == shape else None
    if node.op == "Reshape":
        return _reshaped(grids[0], dims.of(node.inputs[0]), shape)
    if node.op == "Add":
        first, second = grids
        steps_of_sum = tuple(a + b for a, b in zip(first.steps, second.steps, strict=True))
        return Grid(steps_of_sum, first.offset + second.offset)
    if node.op == "Mul":
        return _scaled(*grids)
    return None


def _reshaped(grid: Grid, before: Shape | None, after: Shape) -> Grid | None:
    """The same where a Reshape only puts axes of one element in, or takes them out."""
    longer = [(size, step) for size, step in zip(before or (), grid.steps[-len(before or ()) :], strict=False)]
    steps = iter([step for size, step in longer if size != ONE])
    if before is None or [size for size, _ in longer if size != ONE] != [size for size in after if size != ONE]:
        return None
    return Grid(tuple(next(steps) if size != ONE else ZERO for size in after), grid.offset)


def _aligned(grid: Grid, rank: int) -> Grid:
    return Grid((*(ZERO,) * (rank - len(grid.steps)), *grid.steps), grid.offset)


def _scaled(first: Grid, second: Grid) -> Grid | None:
    """The product, where one of both is the same everywhere."""
    if any(step != ZERO for step in second.steps):
        first, second = second, first
    if any(step != ZERO for step in second.steps):
        return None
    return Grid(tuple(step * second.offset for step in first.steps), first.offset * second.offset)
