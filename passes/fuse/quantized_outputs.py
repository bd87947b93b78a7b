"""What the rules share whose last operator quantizes an activation to 8 bits, one scale for all of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from llmc.passes.graph import Constant, Tensor, dtype_name, load_values, onnx_dtype, shape_of

LEVELS = (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN)
EXAMPLE = {"scale": np.float32(0.02), "zero_point": np.zeros((), np.int8)}


def problem(zero_point: Constant) -> str | None:
    """Why llmc's operators cannot say this quantization."""
    if onnx_dtype(zero_point) not in LEVELS:
        return f"it quantizes to {dtype_name(onnx_dtype(zero_point))}, the operator to int8 or float8e4m3fn"
    values = load_values(zero_point)
    if values.size != 1 or values.astype(np.float32).any():
        return "its zero point is not a single 0"
    return None


def problem_of_shapes(first: Tensor, second: Tensor) -> str | None:
    """Why two tensors are not known to have the same shape."""
    shapes = shape_of(first), shape_of(second)
    if shapes[0] is None or shapes[0] != shapes[1] or None in shapes[0]:
        return f"'{first.name}' and '{second.name}' are not known to have the same shape"
    return None


def constants(scale: float, zero_point: Constant) -> dict[str, Any]:
    """The scale in float32 and the zero point, both scalars."""
    return {"scale": np.float32(scale).reshape(()), "zero_point": load_values(zero_point).reshape(())}
