"""What is certain about shapes: dimensions are positive numbers, or names, and equal names are equal sizes (ONNX IR).

Some exporters write 0 or -1 for a dimension that they do not know: neither proves anything here.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.passes.graph import Shape


def equal_dimensions(a: int | str | None, b: int | str | None) -> bool:
    """Whether two dimensions must be the same size in every run."""
    return a == b and (a > 0 if isinstance(a, int) else bool(a))


def equal_shapes(a: Shape | None, b: Shape | None) -> bool:
    """Whether two shapes must be the same in every run."""
    return a is not None and b is not None and len(a) == len(b) and all(map(equal_dimensions, a, b))


def absorbs(shape: Shape | None, other: Shape | None) -> bool:
    """Whether broadcasting with `other` must leave `shape` as it is, in every run."""
    if other is None or (other and (shape is None or len(other) > len(shape))):
        return False
    return all(o == 1 or equal_dimensions(o, s) for o, s in zip(reversed(other), reversed(shape or ()), strict=False))


def reshapes_to_itself(shape: Shape | None, target: Sequence[int], allow_zero: bool) -> bool:
    """Whether Reshape of a tensor of this shape to `target` must leave it as it is, in every run that Reshape allows.

    Where one dimension is left open, it is what the number of elements makes it. A number in the target leaves it
    open only where the other dimensions cannot be empty.
    """
    if shape is None or len(shape) != len(target) or (allow_zero and 0 in target):
        return False
    pairs = [(wanted, size) for wanted, size in zip(target, shape, strict=True) if wanted != 0]
    unproven = [wanted for wanted, size in pairs if not equal_dimensions(wanted, size)]
    if unproven == [-1] or not unproven:
        return True
    others_are_numbers = sum(isinstance(size, int) and size > 0 for size in shape) == len(shape) - 1
    return others_are_numbers and len(unproven) == 1 and unproven[0] > 0
