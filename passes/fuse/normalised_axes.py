"""What the rules for LayerNormalization and RMSNormalization ask of the axes, the affine part and its types."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from llmc.passes.graph import Array, Shape, Tensor, constant_value, numpy_dtype, onnx_dtype, shape_of

HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
COMPUTED_IN_FLOAT32 = (*HALVES, onnx.TensorProto.FLOAT)
"""Types whose mean and variance the fused operators compute in float32 without loss."""


def problem(x: Tensor, axes: list[int] | None, *affine: Tensor) -> str | None:
    """Why the mean of x over `axes`, with these constants applied to the quotient, is no normalisation of last axes."""
    if onnx_dtype(x) not in COMPUTED_IN_FLOAT32:
        name = "not known" if x.dtype is None else numpy_dtype(onnx_dtype(x)).name
        return f"the type of '{x.name}' is {name}, the fused operator computes in float32"
    shape = shape_of(x)
    if shape is None:
        return f"the rank of '{x.name}' is not known"
    normalised = normalised_shape(shape, axes)
    if normalised is None:
        return f"the mean is over axes {axes} of '{x.name}', not over its last ones"
    for tensor in affine:
        if not is_affine(tensor, normalised):
            return f"'{tensor.name}' has shape {list(tensor.shape)}, {list(normalised)} is needed"
    if not affine and not all(isinstance(n, int) for n in normalised):
        return f"the normalised dimensions of '{x.name}', {list(shape)}, are not all static"
    return None


def problem_of_casts(x: Tensor, to: int) -> str | None:
    """Why casts to float32 before, and to `to` behind, are not what the fused operator does by itself."""
    if onnx_dtype(x) in HALVES and onnx_dtype(x) == to:
        return None
    found = "unknown" if x.dtype is None else numpy_dtype(onnx_dtype(x)).name
    return f"'{x.name}' is {found}, and {numpy_dtype(to).name} behind the cast: not one 16-bit type on both sides"


def problem_of_narrowing(to: int, *affine: Tensor) -> str | None:
    """Why constants that are applied in float32 cannot be applied in the 16-bit type `to`."""
    for tensor in affine:
        values = constant_value(tensor)
        with np.errstate(over="ignore"):
            if values is None or not np.array_equal(values, values.astype(numpy_dtype(to)).astype(values.dtype)):
                return f"'{tensor.name}' has float32 values that {numpy_dtype(to).name} would round"
    return None


def normalised_shape(shape: Shape, axes: Sequence[int] | None) -> Shape | None:
    """The sizes of the last axes, where `axes` names just these; None where it names others."""
    if not axes or sorted(a % len(shape) for a in axes) != list(range(len(shape) - len(axes), len(shape))):
        return None
    return shape[-len(axes) :]


def is_affine(tensor: Tensor, normalised: Shape) -> bool:
    """Whether a constant has one value for each place in the normalised axes; leading axes of size 1 are none."""
    shape = tuple(tensor.shape)
    return shape[-len(normalised) :] == normalised and all(n == 1 for n in shape[: -len(normalised)])


def static_sizes(tensor: Tensor) -> list[int] | None:
    """The shape, where every dimension is a number."""
    shape = shape_of(tensor)
    sizes = [n for n in shape or () if isinstance(n, int)]
    return sizes if shape is not None and len(sizes) == len(shape) else None


def affine(tensor: Tensor, x: Tensor, axes: Sequence[int], to: int | None = None) -> Tensor | Array:
    """The constant in the shape of the normalised axes and, where asked for, in the type `to`."""
    if to is None and len(tensor.shape) == len(axes):
        return tensor
    values = constant_value(tensor)
    assert values is not None
    shaped = values.reshape(x.shape[-len(axes) :])
    return shaped if to is None else shaped.astype(numpy_dtype(to))


def ones(x: Tensor, axes: Sequence[int]) -> Array:
    """The scale that changes nothing."""
    return np.ones(x.shape[-len(axes) :], dtype=numpy_dtype(onnx_dtype(x)))
