"""Casts, Transposes and Reshapes that follow one another, and operators done twice: what one node, or none, can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import onnx

from llmc.passes.graph import Array, Constant, Shape, Tensor, dtype_name, numpy_dtype, onnx_dtype, shape_of
from llmc.passes.pattern import ATTRIBUTE_BECAME_INPUT
from llmc.passes.simplify.local_rules import Instead, Outcome, Rules, Site, StaysError, listed
from llmc.passes.simplify.proven_shapes import equal_dimensions, equal_shapes

VIEWS = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}
"""Operators that change the shape alone: the elements and their order stay."""
FLOATS: dict[int, tuple[int, int, int, int]] = {
    onnx.TensorProto.FLOAT16: (11, 16, 24, 1),
    onnx.TensorProto.BFLOAT16: (8, 128, 133, 1),
    onnx.TensorProto.FLOAT: (24, 128, 149, 1),
    onnx.TensorProto.DOUBLE: (53, 1024, 1074, 1),
}
"""Type → significant bits, bits before the point, bits behind it (with subnormals), sign (IEEE 754)."""
PLAIN = {
    *(onnx.TensorProto.BOOL, *FLOATS),
    *(onnx.TensorProto.INT8, onnx.TensorProto.INT16, onnx.TensorProto.INT32, onnx.TensorProto.INT64),
    *(onnx.TensorProto.UINT8, onnx.TensorProto.UINT16, onnx.TensorProto.UINT32, onnx.TensorProto.UINT64),
}
"""Types that are cast in one way only; 8-bit floats saturate or do not, and 4-bit types are storage."""

rule = PAIRS = Rules()


@rule("Abs", "Ceil", "Floor", "Relu", "Round", "Sign")
def done_before(at: Site) -> Outcome:
    return at.inputs[0] if at.before({at.op}) is not None else None


@rule("BitwiseNot", "Neg", "Not")
def undone(at: Site) -> Outcome:
    before = at.before({at.op})
    return before.inputs[0] if before is not None else None


# Types


@rule("Cast")
def double_cast(at: Site) -> Outcome:
    """a → b → c is a → c where b holds every value of a: nothing is rounded on the way."""
    before = at.before({"Cast"})
    if before is None:
        return None
    source = before.inputs[0]
    first, between, last = onnx_dtype(source), int(before.attributes["to"]), int(at.attributes["to"])
    if not PLAIN.issuperset((first, between, last)):
        return None
    if not holds(between, first):
        raise StaysError(f"{dtype_name(between)} does not hold every {dtype_name(first)}")
    return source if first == last else Instead("Cast", (source,), {"to": last})


def holds(wide: int, narrow: int) -> bool:
    """Whether one plain type has every value of another."""
    return all(w >= n for w, n in zip(_reach(wide), _reach(narrow), strict=True))


def _reach(dtype: int) -> tuple[int, int, int, int]:
    """Of a plain type: significant bits, bits before the point, bits behind it, and whether it has a sign."""
    if dtype in FLOATS:
        return FLOATS[dtype]
    kind = numpy_dtype(dtype)
    bits = 1 if kind.kind == "b" else 8 * kind.itemsize - (kind.kind == "i")
    return bits, bits, 0, int(kind.kind == "i")


# Order of dimensions


def rank_of(tensor: Tensor) -> int | None:
    """The number of dimensions, None where it is not known."""
    shape = shape_of(tensor)
    return None if shape is None else len(shape)


def permutation(at: Site, rank: int | None) -> list[int] | None:
    """The order that a Transpose gives to dimensions; None where it reverses a rank that is not known."""
    if "perm" in at.attributes:
        return [int(axis) for axis in at.attributes["perm"]]
    return None if rank is None else list(range(rank))[::-1]


@rule("Transpose")
def transposed_before(at: Site) -> Outcome:
    """Transpose(Transpose(x, p), q) is Transpose(x, [p[i] for i in q])."""
    before = at.before({"Transpose"})
    if before is None:
        return None
    source = before.inputs[0]
    named = at.attributes.get("perm") or before.attributes.get("perm")
    if named is None:
        return source
    first, second = (cast("list[int]", permutation(site, len(named))) for site in (before, at))
    order = [first[axis] for axis in second]
    return source if order == sorted(order) else Instead("Transpose", (source,), {"perm": order})


# Shapes


def target_of(at: Site) -> list[int] | None:
    """The shape that a Reshape asks for, where it is constant."""
    if at.opset < 5:
        return cast("list[int] | None", at.attributes.get("shape"))
    return listed(at.inputs[1]) if isinstance(at.inputs[1], Constant) else None


def allows_zero(at: Site) -> bool:
    """Whether a 0 in a Reshape's target means none, and not as many as before."""
    return bool(at.attributes.get("allowzero", 0))


@rule(*VIEWS)
def viewed_before(at: Site) -> Outcome:
    """A view of a view is the first tensor again, or its Reshape to the last shape, whatever the shape between is."""
    before = at.before(VIEWS)
    if before is None or at.opset < 5:
        return None
    source, between = before.inputs[0], at.inputs[0]
    if equal_shapes(shape_of(source), shape_of(at.result)) or _opposite(before, at):
        return source
    if at.op == before.op and at.op in ("Squeeze", "Unsqueeze"):
        return _axes_together(before, at)
    if at.op != "Reshape":
        return _reshape_to_known(source, shape_of(at.result))
    target = target_of(at)
    if allows_zero(at) or (target is not None and 0 not in target):
        return Instead("Reshape", (source, at.inputs[1]), dict(at.attributes))
    if target is None:
        raise StaysError(f"its shape is computed in each run, and a 0 in it would mean a dimension of '{between.name}'")
    return Instead("Reshape", (source, _without_looking(target, between, source)))


def _without_looking(target: Sequence[int], between: Tensor, source: Tensor) -> Array:
    """The target with each 0 (a dimension of `between`) made a number, a 0 for the same of `source`, or one -1."""
    middle, first = shape_of(between) or (), shape_of(source) or ()
    resolved = list(target)
    unresolved = []
    for index in (index for index, size in enumerate(target) if size == 0):
        copied = middle[index] if index < len(middle) else None
        if isinstance(copied, int) and copied > 0:
            resolved[index] = copied
        elif index >= len(first) or not equal_dimensions(copied, first[index]):
            unresolved.append(index)
    if unresolved:
        others = [size for index, size in enumerate(resolved) if index not in unresolved]
        if len(unresolved) > 1 or any(size <= 0 for size in others):
            raise StaysError(f"a 0 in its shape means a dimension of '{between.name}', which is not known")
        resolved[unresolved[0]] = -1
    return np.array(resolved, dtype=np.int64)


def _reshape_to_known(source: Tensor, shape: Shape | None) -> Instead:
    if shape is None:
        raise StaysError("the shape of its result is not known")
    known = [size if isinstance(size, int) and size > 0 else -1 for size in shape]
    if known.count(-1) > 1:
        raise StaysError("more than one dimension of its result is not known")
    return Instead("Reshape", (source, np.array(known, dtype=np.int64)))


def _opposite(before: Site, at: Site) -> bool:
    """Squeeze and Unsqueeze, in either order, of the same axes: both count them in the same, larger rank."""
    if {before.op, at.op} != {"Squeeze", "Unsqueeze"} or not (before.told and at.told):
        return False
    axes = before.integers("axes")
    return axes is not None and axes == at.integers("axes")


def _axes_together(before: Site, at: Site) -> Instead | None:
    """Two Squeeze, or two Unsqueeze, in one: the axes of both, counted in the largest of the ranks."""
    if not (before.told and at.told):
        return None
    outer, inner = (at, before) if at.op == "Unsqueeze" else (before, at)
    first, second = outer.integers("axes"), inner.integers("axes")
    if first is None or second is None:
        return None
    rank = rank_of(at.result if at.op == "Unsqueeze" else before.inputs[0])
    if rank is None and min([*first, *second], default=0) < 0:
        raise StaysError("its negative axes count from a rank that is not known")
    if rank is None:  # as large as it must be: axes that are not negative do not depend on it
        rank = max([*first, *second], default=0) + len(first) + len(second) + 1
    taken = {axis % rank for axis in first}
    left = [axis for axis in range(rank) if axis not in taken]
    return _on_axes(at, before.inputs[0], sorted(taken | {left[axis] for axis in second}))


def _on_axes(at: Site, tensor: Tensor, axes: Sequence[int]) -> Instead:
    """The same operator on these axes, as the opset writes it."""
    if at.opset < ATTRIBUTE_BECAME_INPUT[at.op]["axes"][1]:
        return Instead(at.op, (tensor,), {"axes": list(axes)})
    return Instead(at.op, (tensor, np.array(axes, dtype=np.int64)))
