"""What SwiGLUQuantize computes, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def product(gate: Array, up: Array) -> Array:
    """SiLU(gate) · up in float64."""
    wide = gate.astype(np.float64)
    silu: Array = wide / (1 + np.exp(-np.clip(wide, -700, None)))
    return silu * up.astype(np.float64)


def reference(gate: Array, up: Array, scale: Array, zero_point: Array) -> Array:
    """The product over `scale`, rounded to the type of `zero_point`, ties to even, and saturated."""
    levels = product(gate, up) / np.float64(scale)
    if zero_point.dtype == np.int8:
        return np.clip(np.rint(levels), -128, 127).astype(np.int8)
    return np.clip(levels, -448, 448).astype(np.float32).astype(zero_point.dtype)
