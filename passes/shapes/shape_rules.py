"""How operators make the shapes of their results, and the values of small integer tensors: rules of `Dimensions`.

A rule answers None, or a shape with an unknown size, where it cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from llmc.passes.graph import Node, load_values
from llmc.passes.match import attribute
from llmc.passes.shapes.dimension import ONE, Dimension, Shape, Values, product

if TYPE_CHECKING:
    from llmc.passes.shapes.dimensions import Dimensions

# Shapes


def _like_first(dims: Dimensions, node: Node) -> list[Shape | None]:
    return [dims.of(node.inputs[0])]


def _elementwise(dims: Dimensions, node: Node) -> list[Shape | None]:
    return [dims.broadcast(*(dims.of(tensor) for tensor in node.inputs))]


def _shape(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    shape = dims.of(node.inputs[0])
    return None if shape is None else [(Dimension.of(len(shape[node.attrs.get("start", 0) : node.attrs.get("end")])),)]


def _matmul(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    left, right = dims.of(node.inputs[0]), dims.of(node.inputs[1])
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    batch = dims.broadcast(left[:-2], right[:-2])
    return None if batch is None else [(*batch, left[-2], right[-1])]


def _gemm(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    left, right = dims.of(node.inputs[0]), dims.of(node.inputs[1])
    if left is None or right is None:
        return None
    return [(left[1 if node.attrs.get("transA", 0) else 0], right[0 if node.attrs.get("transB", 0) else 1])]


def _transpose(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    shape = dims.of(node.inputs[0])
    if shape is None:
        return None
    order = node.attrs.get("perm") or range(len(shape))[::-1]
    return [tuple(shape[axis] for axis in order)]


def _reshape(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    source, target = dims.of(node.inputs[0]), dims.values(node.inputs[1])
    if target is None:
        return None
    sizes: list[Dimension | None] = []
    for axis, value in enumerate(target):
        copied = value == Dimension.of(0) and not node.attrs.get("allowzero", 0)
        size = source[axis] if copied and source is not None and axis < len(source) else value
        sizes.append(size if isinstance(size, Dimension) and size.positive and size.terms else None)
    if sizes.count(None) == 1 and source is not None:
        rest = product([s for s in sizes if s is not None])
        sizes[sizes.index(None)] = product(source).over(rest)
    return [tuple(size if size is not None else dims.unknown() for size in sizes)]


def _unsqueeze(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    shape, axes = dims.of(node.inputs[0]), attribute(node, "axes")
    if shape is None or axes is None:
        return None
    rank = len(shape) + len(axes)
    new = {axis % rank for axis in axes}
    rest = iter(shape)
    return [tuple(ONE if axis in new else next(rest) for axis in range(rank))]


def _squeeze(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    shape, axes = dims.of(node.inputs[0]), attribute(node, "axes")
    if shape is None or (axes is None and any(size.number is None for size in shape)):
        return None
    gone = {axis % len(shape) for axis in axes} if axes is not None else {i for i, n in enumerate(shape) if n == ONE}
    return [tuple(size for axis, size in enumerate(shape) if axis not in gone)]


def _concat(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    shapes = [dims.of(tensor) for tensor in node.inputs]
    first = shapes[0]
    if first is None or any(shape is None for shape in shapes):
        return None
    axis = node.attrs["axis"] % len(first)
    joined = reduce(Dimension.__add__, (shape[axis] for shape in shapes if shape is not None))
    return [(*first[:axis], joined, *first[axis + 1 :])]


def _gather(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    data, indices = dims.of(node.inputs[0]), dims.of(node.inputs[1])
    if data is None or indices is None:
        return None
    axis = node.attrs.get("axis", 0) % len(data)
    return [(*data[:axis], *indices, *data[axis + 1 :])]


def _like_indices(dims: Dimensions, node: Node) -> list[Shape | None]:
    return [dims.of(node.inputs[1])]


def _flatten(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    shape = dims.of(node.inputs[0])
    if shape is None:
        return None
    axis = node.attrs.get("axis", 1)
    axis += len(shape) if axis < 0 else 0
    return [(product(shape[:axis]), product(shape[axis:]))]


def _gather_nd(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    data, indices = dims.of(node.inputs[0]), dims.of(node.inputs[1])
    if data is None or indices is None or indices[-1].number is None:
        return None
    return [(*indices[:-1], *data[node.attrs.get("batch_dims", 0) + indices[-1].number :])]


def _slice(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    shape = dims.of(node.inputs[0])
    if shape is None or len(node.inputs) < 3:
        return None
    starts, ends, axes, steps = slice_inputs(dims, node, len(shape))
    sizes: list[Dimension | None] = list(shape)
    if axes is None or steps is None or len(axes) != len(steps):
        return [tuple(dims.unknown() for _ in shape)]
    for position, axis in enumerate(axes):
        unit = steps[position] == 1
        start = starts[position] if starts is not None else None
        end = ends[position] if ends is not None else None
        sizes[axis] = _sliced(dims, shape[axis], start, end) if unit else None
    return [tuple(size if size is not None else dims.unknown() for size in sizes)]


def _sliced(dims: Dimensions, size: Dimension, start: Dimension | None, end: Dimension | None) -> Dimension | None:
    """The length of `[start:end]` of an axis with this size."""
    first = start.number if start is not None else None
    if start is not None and (start + size).number == 0:  # from as many before the end as there are
        first = 0
    last = end.number if end is not None else None
    if size.number is not None and first is not None and last is not None:
        return Dimension.of(len(range(size.number)[first:last]))
    if first == 0 and end is not None and (end == size or (last is not None and last >= 1 << 31)):
        return size
    if first == 0 and last is not None and last < 0 and size.positive and dict(size.terms).get((), 0) >= -last:
        return size + Dimension.of(last)
    if first == 0 and end is not None and end.positive and last is None and size.number is not None:
        return dims.clipped(end, size.number)
    return None


def takes_all(dims: Dimensions, node: Node) -> bool:
    """Whether a Slice with inputs must give back what it gets: no axis gets shorter, and none is turned around."""
    shape = dims.of(node.inputs[0])
    steps = slice_inputs(dims, node, len(shape))[3] if shape and len(node.inputs) > 2 else None
    return steps is not None and set(steps) <= {1} and _slice(dims, node) == [shape]


def slice_inputs(
    dims: Dimensions, node: Node, rank: int
) -> tuple[list[Dimension | None] | None, list[Dimension | None] | None, list[int] | None, list[int] | None]:
    """Starts, ends, axes and steps of a Slice with inputs; None for what is not known."""

    def sizes(position: int) -> list[Dimension | None] | None:
        found = dims.values(node.inputs[position])
        return None if found is None else [v if isinstance(v, Dimension) else None for v in found]

    starts, ends = sizes(1), sizes(2)
    length = dims.of(node.inputs[1])
    count = length[0].number if length else None
    axes = None if count is None else list(range(count))
    steps = None if count is None else [1] * count
    if len(node.inputs) > 3 and not node.inputs[3].is_empty():
        axes = dims.integers(node.inputs[3])
    if len(node.inputs) > 4 and not node.inputs[4].is_empty():
        steps = dims.integers(node.inputs[4])
    return starts, ends, None if axes is None else [axis % rank for axis in axes], steps


def _split(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    shape = dims.of(node.inputs[0])
    if shape is None:
        return None
    axis = node.attrs.get("axis", 0) % len(shape)
    sizes = attribute(node, "split")
    if sizes is None:
        total, count = shape[axis].number, len(node.outputs)
        if total is None or total % count:
            return None
        sizes = [total // count] * count
    return [(*shape[:axis], Dimension.of(size), *shape[axis + 1 :]) for size in sizes]


def _expand(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    target = dims.values(node.inputs[1])
    if target is None:
        return None
    sizes = tuple(v if isinstance(v, Dimension) and v.positive else dims.unknown() for v in target)
    return [dims.broadcast(dims.of(node.inputs[0]), sizes)]


def _tile(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    shape, repeats = dims.of(node.inputs[0]), dims.values(node.inputs[1])
    if shape is None or repeats is None or len(shape) != len(repeats):
        return None
    pairs = zip(shape, repeats, strict=True)
    return [tuple(n * r if isinstance(r, Dimension) and r.positive else dims.unknown() for n, r in pairs)]


def _filled(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    target = dims.values(node.inputs[0])
    if target is None:
        return None
    return [tuple(v if isinstance(v, Dimension) and v.positive else dims.unknown() for v in target)]


def _range(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    start, limit, step = (dims.values(tensor) for tensor in node.inputs)
    if not start or not limit or step != (ONE,) or not isinstance(start[0], Dimension):
        return None
    if not isinstance(limit[0], Dimension):
        return None
    size = limit[0] + start[0] * Dimension.of(-1)
    return [(size,)] if size.positive else None


def _reduce(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    shape, axes = dims.of(node.inputs[0]), attribute(node, "axes")
    if shape is None or axes is None:
        return None
    gone = {axis % len(shape) for axis in axes}
    keep = node.attrs.get("keepdims", 1)
    return [tuple(ONE if i in gone else size for i, size in enumerate(shape) if keep or i not in gone)]


def _attention(dims: Dimensions, node: Node) -> list[Shape | None] | None:
    query, value = dims.of(node.inputs[0]), dims.of(node.inputs[2])
    if query is None or value is None:
        return None
    if len(query) == 4:
        return [(*query[:3], value[3]), *(_present(dims, node, index) for index in (1, 2))]
    heads = value[2].over(Dimension.of(node.attrs["kv_num_heads"]))
    return None if heads is None else [(*query[:2], heads * Dimension.of(node.attrs["q_num_heads"]))]


def _present(dims: Dimensions, node: Node, index: int) -> Shape | None:
    """Keys (1) or values (2) that an Attention gives back: those of before, and the new ones behind them."""
    past = node.inputs[index + 3] if len(node.inputs) > index + 3 else None
    before, new = (dims.of(past) if past is not None else None), dims.of(node.inputs[index])
    if before is None or new is None or len(before) != 4 or len(new) != 4:
        return None
    return (*new[:2], before[2] + new[2], new[3])


# fmt: off
KEEP = (
    "Abs", "BatchNormalization", "Cast", "Ceil", "Clip", "Cos", "CumSum", "DequantizeLinear", "Dropout", "Elu", "Erf",
    "Exp", "Floor", "Gelu", "HardSwish", "Identity", "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu", "Log", "Mish",
    "Neg", "Not", "QuantizeLinear", "RMSNormalization", "Reciprocal", "Relu", "RotaryEmbedding", "ScatterND", "Sigmoid",
    "Sign", "Sin", "Softmax", "Softplus", "Sqrt", "Swish", "Tanh", "Trilu",
)
"""Operators whose first result has the shape of their first input."""
BROADCAST = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Or",
    "Pow", "Sub", "Sum", "Where", "Xor",
)
# fmt: on

SHAPE_RULES: dict[str, Callable[[Dimensions, Node], list[Shape | None] | None]] = {
    **dict.fromkeys(KEEP, _like_first),
    **dict.fromkeys(BROADCAST, _elementwise),
    **{f"Reduce{kind}": _reduce for kind in ("Mean", "Sum", "Max", "Min", "L2", "Prod")},
    "Attention": _attention,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Expand": _expand,
    "Gather": _gather,
    "Flatten": _flatten,
    "GatherElements": _like_indices,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


# Values


def _value_of_shape(dims: Dimensions, node: Node) -> Values | None:
    shape = dims.of(node.inputs[0])
    return None if shape is None else shape[node.attrs.get("start", 0) : node.attrs.get("end")]


def _same_values(dims: Dimensions, node: Node) -> Values | None:
    return dims.values(node.inputs[0])


def _concat_values(dims: Dimensions, node: Node) -> Values | None:
    parts = [dims.values(tensor) for tensor in node.inputs]
    sizes = [dims.of(tensor) for tensor in node.inputs]
    if any(size is None or len(size) != 1 or size[0].number is None for size in sizes):
        return None
    known = zip(parts, sizes, strict=True)
    return tuple(v for part, size in known for v in (part or (None,) * (size[0].number or 0)))  # type: ignore[index]


def _gather_values(dims: Dimensions, node: Node) -> Values | None:
    data, indices = dims.values(node.inputs[0]), dims.integers(node.inputs[1])
    shape = dims.of(node.inputs[0])
    if data is None or indices is None or shape is None or len(shape) != 1:
        return None
    return tuple(data[index] for index in indices)


def _slice_values(dims: Dimensions, node: Node) -> Values | None:
    data, shape = dims.values(node.inputs[0]), dims.of(node.inputs[0])
    if data is None or shape is None or len(shape) != 1 or len(node.inputs) < 3:
        return None
    starts, ends, axes, steps = slice_inputs(dims, node, 1)
    if not starts or not ends or not axes or not steps or starts[0] is None or ends[0] is None:
        return None
    first, last = starts[0].number, ends[0].number
    return None if first is None or last is None else data[first : last : steps[0]]


def _aligned(dims: Dimensions, node: Node) -> Iterator[tuple[Dimension | bool | None, ...]]:
    """The operands' elements side by side; not known where they broadcast in more than one axis."""
    shape = dims.of(node.outputs[0])
    count = product(shape).number if shape is not None else None
    rows = [dims.values(tensor) or (None,) for tensor in node.inputs]
    for index in range(count or 0):
        yield tuple(row[index] if len(row) == count else (row[0] if len(row) == 1 else None) for row in rows)


def _pairwise(
    combine: Callable[[Dimension, Dimension], Dimension | bool | None],
) -> Callable[[Dimensions, Node], Values | None]:
    def rule(dims: Dimensions, node: Node) -> Values | None:
        a, b = dims.values(node.inputs[0]), dims.values(node.inputs[1])
        if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
            return None
        count = max(len(a), len(b))
        pairs = zip(a * (count // len(a) if a else 1), b * (count // len(b) if b else 1), strict=True)
        return tuple(combine(x, y) if isinstance(x, Dimension) and isinstance(y, Dimension) else None for x, y in pairs)

    return rule


def _equal(a: Dimension, b: Dimension) -> bool | None:
    """Sizes are never negative, so that one is never equal to -1."""
    if a.number is not None and b.number is not None:
        return a == b
    negative = next((d.number for d in (a, b) if d.number is not None and d.number < 0), None)
    return False if negative is not None and (a.positive or b.positive) else (True if a == b else None)


def _where_values(dims: Dimensions, node: Node) -> Values | None:
    return tuple(
        (a if test else b) if isinstance(test, bool) else (a if a == b else None) for test, a, b in _aligned(dims, node)
    )


def _filled_values(dims: Dimensions, node: Node) -> Values | None:
    shape, value = dims.of(node.outputs[0]), node.attrs.get("value")
    if shape is None or value is None or not np.issubdtype(value.dtype, np.integer):
        return None
    return tuple(Dimension.of(int(load_values(value)[0])) for _ in range(prod(size.number or 0 for size in shape)))


def _size_values(dims: Dimensions, node: Node) -> Values | None:
    shape = dims.of(node.inputs[0])
    return None if shape is None else (product(shape),)


def _negated_values(dims: Dimensions, node: Node) -> Values | None:
    values = dims.values(node.inputs[0])
    negated = (size * Dimension.of(-1) if isinstance(size, Dimension) else None for size in values or ())
    return None if values is None else tuple(negated)


VALUE_RULES: dict[str, Callable[[Dimensions, Node], Values | None]] = {
    **dict.fromkeys(("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"), _same_values),
    "Add": _pairwise(Dimension.__add__),
    "Concat": _concat_values,
    "ConstantOfShape": _filled_values,
    "Div": _pairwise(Dimension.over),
    "Equal": _pairwise(_equal),
    "Gather": _gather_values,
    "Mul": _pairwise(Dimension.__mul__),
    "Neg": _negated_values,
    "Shape": _value_of_shape,
    "Size": _size_values,
    "Slice": _slice_values,
    "Sub": _pairwise(lambda a, b: a + b * Dimension.of(-1)),
    "Where": _where_values,
}
