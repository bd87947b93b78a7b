"""The levels of symmetric quantization, INT8 and FP8, and the scales between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from llmc.passes.graph import Array, numpy_dtype

LEVELS = 127
"""Symmetric INT8 is -127 … 127."""
FINE = 2.0**-17
"""From here up, float16 is no coarser than 2**-7 of the value."""


@dataclass(frozen=True)
class Levels:
    """A type whose values, times a scale, stand for real numbers."""

    name: str
    """In the names of tensors."""
    dtype: int
    """As ONNX numbers it."""
    largest: float
    since: int
    """The opset from which QuantizeLinear has it, with an axis."""

    @property
    def numpy(self) -> np.dtype[Any]:
        return numpy_dtype(self.dtype)

    def scales(self, amax: Array, dtype: np.dtype[np.floating]) -> Array:
        """`amax` / largest in `dtype`, above 0 always; 1 where `amax` is 0. Rounded up to float16, unless that is too
        coarse.

        Rounded before anything is quantized with it, it costs some resolution (2**-10, as a rule), and no value moves
        when the graph goes to float16.
        """
        exact = np.maximum(np.where(amax > 0, amax, self.largest) / np.float64(self.largest), np.finfo(np.float32).tiny)
        with np.errstate(over="ignore"):
            half = exact.astype(np.float16)
        half = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
        if dtype == np.float16:
            return half
        return np.where((exact >= FINE) & np.isfinite(half), half, exact).astype(dtype)

    def quantize(self, values: Array, scale: Array) -> Array:
        """The level nearest to values / scale; `scale` broadcasts. Ties round to even, as QuantizeLinear does."""
        exact = np.clip(values / scale.astype(np.float32), -self.largest, self.largest)
        return (np.rint(exact) if self.numpy.kind == "i" else exact).astype(self.numpy)


INT8 = Levels("int8", onnx.TensorProto.INT8, LEVELS, since=13)
FP8 = Levels("fp8", onnx.TensorProto.FLOAT8E4M3FN, 448.0, since=19)
"""E4M3: four bits of exponent, three of fraction, no infinities."""


def to_levels(values: Array, reach: Array) -> Array:
    """`values` on the levels from -reach to reach, as floats; `reach` broadcasts."""
    step = np.where(reach > 0, reach, LEVELS) / np.float32(LEVELS)
    levels: Array = np.clip(np.rint(values / step), -LEVELS, LEVELS) * step
    return levels
