"""What QuantizeLinear (Q) and DequantizeLinear (DQ) of a graph say: grids of levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import ml_dtypes
import numpy as np

from llmc.passes.graph import Array, Constant, Node, Tensor, constant_value, numpy_dtype

SIGNED: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.uint8): np.dtype(np.int8),
    np.dtype(ml_dtypes.uint4): np.dtype(ml_dtypes.int4),
}
"""Unsigned level → the signed one half its range away."""
LEVELS = {*SIGNED, *SIGNED.values()}
"""Types of levels that DQ and then Q by one normal scale give back, in float32 and in float16."""


@dataclass(frozen=True)
class Grid:
    """What levels stand for: scale and zero point by value, scalars or along an axis."""

    scale: Array
    zero: Array
    axis: int | None

    def same(self, other: Grid) -> bool:
        mine, yours = (self.scale, self.zero), (other.scale, other.zero)
        alike = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(mine, yours, strict=True))
        return alike and self.axis == other.axis

    @property
    def is_normal(self) -> bool:
        """Whether no level times its scale is subnormal or infinite, or lost to a scale of 0."""
        info = ml_dtypes.finfo(self.scale.dtype)  # type: ignore[no-untyped-call]
        wide = np.abs(self.scale.astype(np.float64))
        return bool((wide >= float(info.smallest_normal)).all() and (wide * 256 <= float(info.max)).all())

    def __str__(self) -> str:
        if self.axis is not None:
            return f"scales and zero points along axis {self.axis}"
        return f"scale {float(self.scale):.6g} and zero point {int(self.zero)} ({self.zero.dtype})"


def grid(node: Node) -> Grid | None:
    """The grid of a Q or DQ; None where it is computed, in blocks, or of unknown axis."""
    scale = constant_value(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    zero = constant_value(given) if given is not None else None
    if scale is None or (given is not None and zero is None) or node.attrs.get("block_size", 0):
        return None
    if zero is None:
        zero = np.zeros(scale.shape, levels_dtype(node))
    if scale.size == 1:
        return Grid(scale.reshape(()), zero.reshape(()), None)
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else None
    axis = cast(int, node.attrs.get("axis", 1))
    if scale.ndim != 1 or (rank is None and axis < 0):
        return None
    return Grid(scale, zero, axis % rank if rank else axis)


def levels_dtype(node: Node) -> np.dtype[Any]:
    """The type of the levels that a Q makes, or a DQ reads, without a zero point."""
    if node.op == "QuantizeLinear":
        asked = node.attrs.get("output_dtype", 0)
        return numpy_dtype(asked) if asked else np.dtype(np.uint8)
    dtype = node.inputs[0].dtype
    return np.dtype(dtype if dtype is not None else np.uint8)


def producer(tensor: Tensor, *operators: str) -> Node | None:
    """The node that makes a tensor, where it is one of these operators of ONNX."""
    node = None if isinstance(tensor, Constant) or not tensor.inputs else tensor.inputs[0]
    return node if node is not None and node.op in operators and not node.domain else None


def along(values: Array, axis: int | None, rank: int) -> Array:
    """Values of a grid, in a shape that broadcasts with levels of this rank."""
    if axis is None:
        return values.reshape(())
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])
