"""Scales of quantization, in numbers that every type the graph may go to can hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.passes.graph import Array

FINE = 2.0**-17
"""From here up, float16 is no coarser than 2**-7 of the value."""


def rounded_up(scale: Array, dtype: np.dtype[Any]) -> Array:
    """Scales above 0 in `dtype`, rounded up to float16, unless that is too coarse and `dtype` is finer.

    Rounded before anything is quantized with it, a scale costs some resolution (2**-10, as a rule), and no value moves
    when the graph goes to float16.
    """
    exact = np.maximum(scale, np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
        half = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
    if dtype == np.float16:
        return half
    return np.where((exact >= FINE) & np.isfinite(half), half, exact).astype(dtype)
