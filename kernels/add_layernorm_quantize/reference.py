"""What AddLayerNormQuantize computes, in float64 after the sum."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def normalized(x: Array, residual: Array, weight: Array, bias: Array, *, epsilon: float) -> tuple[Array, Array]:
    """The sum, in the type of x, and its normalization in float64: both [..., D]."""
    total = x + residual
    wide = total.astype(np.float64)
    centred = wide - np.mean(wide, axis=-1, keepdims=True)
    root = np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + epsilon)
    return total, centred / root * weight.astype(np.float64) + bias.astype(np.float64)


def reference(
    x: Array, residual: Array, weight: Array, bias: Array, scale: Array, zero_point: Array, *, epsilon: float
) -> tuple[Array, Array]:
    """The sum, and the normalization over `scale` rounded to the type of `zero_point`, ties to even, and saturated."""
    total, scaled = normalized(x, residual, weight, bias, epsilon=epsilon)
    levels = scaled / np.float64(scale)
    if zero_point.dtype == np.int8:
        return total, np.clip(np.rint(levels), -128, 127).astype(np.int8)
    return total, np.clip(levels, -448, 448).astype(np.float32).astype(zero_point.dtype)
