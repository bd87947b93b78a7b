"""What DequantGemv computes, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def weight_values(weight: Array, scale: Array, block: int) -> Array:
    """W [N, K] float64, of int4 [N, K] and scale [N, K / block]; each product is rounded to the type of the scale."""
    spread = np.repeat(scale, block, axis=1)
    values: Array = (weight.astype(scale.dtype) * spread).astype(np.float64)
    return values


def reference(x: Array, weight: Array, scale: Array, *, block: int) -> Array:
    """y [..., N] float64, of x [..., K]."""
    product: Array = x.astype(np.float64) @ weight_values(weight, scale, block).T
    return product
