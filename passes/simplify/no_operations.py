"""Nodes that do nothing: what each equals."""

from __future__ import annotations

from typing import cast

from llmc.passes.graph import Constant, Tensor, constant_value, onnx_dtype, shape_of
from llmc.passes.simplify.local_rules import Outcome, Rules, Site, StaysError, filled_with, listed
from llmc.passes.simplify.proven_shapes import absorbs, equal_shapes, reshapes_to_itself
from llmc.passes.simplify.views import allows_zero, permutation, rank_of, target_of

TO_THE_END = 2**31 - 1
"""ONNX, Slice: an end of INT_MAX or more means the end of a dimension of any size."""
PLAIN_RESIZE = {"half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"}
"""Coordinate transformations that are the identity where the size stays."""
NEUTRAL: dict[str, tuple[int, tuple[int, ...]]] = {
    "Add": (0, (1, 0)),
    "Sub": (0, (1,)),
    "Mul": (1, (1, 0)),
    "Div": (1, (1,)),
    "Pow": (1, (1,)),
    "And": (1, (1, 0)),
    "Or": (0, (1, 0)),
    "Xor": (0, (1, 0)),
    "BitShift": (0, (1,)),
    "BitwiseOr": (0, (1, 0)),
    "BitwiseXor": (0, (1, 0)),
}
"""Operator → the number that changes nothing, and the operands that it may be."""

rule = NO_OPERATIONS = Rules()


def must_absorb(kept: Tensor, other: Tensor) -> None:
    """Raise StaysError where broadcasting with `other` may change the shape of `kept`."""
    if not absorbs(shape_of(kept), shape_of(other)):
        raise StaysError(f"'{other.name}' may broadcast '{kept.name}' to another shape")


@rule("Identity")
def identity(at: Site) -> Outcome:
    return at.inputs[0]


@rule("Concat", "Max", "Mean", "Min", "Sum")
def one_input(at: Site) -> Outcome:
    return at.inputs[0] if len(at.inputs) == 1 else None


@rule("Split")
def one_output(at: Site) -> Outcome:
    return at.inputs[0] if len(at.node.outputs) == 1 else None


@rule("Dropout")
def dropout_at_inference(at: Site) -> Outcome:
    """By attribute before opset 7, always until 11, by an input since."""
    if at.opset < 7 and not at.attributes.get("is_test", 0):
        raise StaysError("it drops: its 'is_test' is 0")
    training = at.given(2)
    if training is not None:
        value = constant_value(training)
        if value is None or bool(value):
            raise StaysError(f"it drops where '{training.name}' is true")
    return at.inputs[0]


@rule(*NEUTRAL)
def neutral_operand(at: Site) -> Outcome:
    number, positions = NEUTRAL[at.op]
    for position in positions:
        operand, kept = at.inputs[position], at.inputs[1 - position]
        if filled_with(operand, number):
            must_absorb(kept, operand)
            return kept
    return None


@rule("Clip")
def no_bounds(at: Site) -> Outcome:
    bounded = "min" in at.attributes or "max" in at.attributes or at.given(1) is not None or at.given(2) is not None
    return None if bounded else at.inputs[0]


@rule("Where")
def constant_condition(at: Site) -> Outcome:
    condition, chosen, other = at.inputs
    if chosen is not other:
        if filled_with(condition, False):
            chosen, other = other, chosen
        elif not filled_with(condition, True):
            return None
    must_absorb(chosen, condition)
    must_absorb(chosen, other)
    return chosen


@rule("Slice")
def slice_of_everything(at: Site) -> Outcome:
    if not at.told or (at.given(4) is not None and not filled_with(at.inputs[4], 1)):
        return None
    starts, ends = at.integers("starts") or [], at.integers("ends") or []
    axes = at.integers("axes")
    shape = shape_of(at.inputs[0])
    for start, end, axis in zip(starts, ends, axes if axes is not None else range(len(starts)), strict=True):
        size = shape[axis] if shape is not None else None
        known = isinstance(size, int) and size > 0
        from_first = start == 0 or (known and start <= -cast(int, size))
        if not from_first or not (end >= TO_THE_END or (known and end >= cast(int, size))):
            return None
    return at.inputs[0]


@rule("Pad")
def pad_of_zero(at: Site) -> Outcome:
    pads = at.integers("pads") if at.told else None
    return at.inputs[0] if pads is not None and not any(pads) else None


@rule("Tile")
def tile_by_ones(at: Site) -> Outcome:
    return at.inputs[0] if at.opset >= 6 and filled_with(at.inputs[1], 1) else None


@rule("DepthToSpace", "SpaceToDepth")
def blocks_of_one(at: Site) -> Outcome:
    return at.inputs[0] if at.attributes["blocksize"] == 1 else None


@rule("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")
def reduction_of_no_axes(at: Site) -> Outcome:
    nothing = at.attributes.get("noop_with_empty_axes", 0) and at.told and not at.integers("axes")
    return at.inputs[0] if nothing else None


@rule("Resize", "Upsample")
def resize_by_one(at: Site) -> Outcome:
    if not at.told:
        return None
    tensor = at.inputs[0]
    scales = at.given(2 if at.op == "Resize" and at.opset >= 11 else 1)
    sizes = at.given(3)
    if at.op == "Upsample" and at.opset < 9:
        same = set(at.attributes["scales"]) == {1.0}
    elif sizes is not None:
        shape = shape_of(tensor) or ()
        axes = at.attributes.get("axes", range(len(shape)))
        wanted = listed(sizes)
        same = equal_shapes(tuple(wanted), tuple(shape[axis] for axis in axes if axis < len(shape)))
    else:
        same = scales is not None and filled_with(scales, 1)
    if not same:
        return None
    mode = at.attributes.get("coordinate_transformation_mode", "half_pixel")
    if mode not in PLAIN_RESIZE:
        raise StaysError(f"coordinate_transformation_mode '{mode}' moves elements even where the size stays")
    if at.attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise StaysError("keep_aspect_ratio_policy may choose another size")
    return tensor


@rule("Cast", "CastLike")
def same_type(at: Site) -> Outcome:
    to = at.attributes["to"] if at.op == "Cast" else onnx_dtype(at.inputs[1])
    return at.inputs[0] if to and onnx_dtype(at.inputs[0]) == to else None


@rule("Transpose")
def keeps_order(at: Site) -> Outcome:
    order = permutation(at, rank_of(at.inputs[0]))
    return at.inputs[0] if order is not None and order == sorted(order) else None


@rule("Expand", "Flatten", "Reshape", "Squeeze", "Tile", "Unsqueeze")
def same_shape(at: Site) -> Outcome:
    return at.inputs[0] if equal_shapes(shape_of(at.inputs[0]), shape_of(at.result)) else None


@rule("Expand")
def expand_to_itself(at: Site) -> Outcome:
    target = at.inputs[1]
    itself = isinstance(target, Constant) and absorbs(shape_of(at.inputs[0]), tuple(listed(target)))
    return at.inputs[0] if itself else None


@rule("Reshape")
def reshape_to_itself(at: Site) -> Outcome:
    target = target_of(at)
    itself = target is not None and reshapes_to_itself(shape_of(at.inputs[0]), target, allows_zero(at))
    return at.inputs[0] if itself else None
