"""The 255 levels of symmetric INT8, and the scales between them."""

from __future__ import annotations

import numpy as np

from llmc.passes.graph import Array

LEVELS = 127
"""Symmetric INT8 is -127 … 127."""
FINE = 2.0**-17
"""From here up, float16 is no coarser than 2**-7 of the value."""


def scales(amax: Array, dtype: np.dtype[np.floating]) -> Array:
    """`amax` / 127 in `dtype`, above 0 always; 1 where `amax` is 0. Rounded up to float16, unless that is too coarse.

    Rounded before anything is quantized with it, it costs some resolution (2**-10, as a rule), and no value moves
    when the graph goes to float16.
    """
    exact = np.maximum(np.where(amax > 0, amax, LEVELS) / np.float64(LEVELS), np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    half = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
    if dtype == np.float16:
        return half
    return np.where((exact >= FINE) & np.isfinite(half), half, exact).astype(dtype)


def quantize(weight: Array, scale: Array) -> Array:
    """round(weight / scale) as int8; `scale` broadcasts. Ties round to even, as QuantizeLinear does."""
    return np.clip(np.rint(weight / scale.astype(np.float32)), -LEVELS, LEVELS).astype(np.int8)


def to_levels(values: Array, reach: Array) -> Array:
    """`values` on the levels from -reach to reach, as floats; `reach` broadcasts."""
    step = np.where(reach > 0, reach, LEVELS) / np.float32(LEVELS)
    levels: Array = np.clip(np.rint(values / step), -LEVELS, LEVELS) * step
    return levels
