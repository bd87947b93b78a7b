"""The levels of symmetric quantization, INT8 and FP8, and the scales between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from llmc.passes.graph import Array, numpy_dtype
from llmc.passes.precision.scales import rounded_up

LEVELS = 127
"""Symmetric INT8 is -127 … 127."""


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
        """`amax` / largest in `dtype`, rounded up to what float16 holds too; 1 where `amax` is 0."""
        return rounded_up(np.where(amax > 0, amax, self.largest) / np.float64(self.largest), dtype)

    def quantize(self, values: Array, scale: Array) -> Array:
        """The level nearest to values / scale; `scale` broadcasts. Ties round to even, as QuantizeLinear does."""
        exact = np.clip(values / scale.astype(np.float32), -self.largest, self.largest)
        return (np.rint(exact) if self.numpy.kind == "i" else exact).astype(self.numpy)

    def saturate(self, values: Array, scale: Array) -> Array:
        """What QuantizeLinear makes of activations: integers reach one further below 0 than above."""
        if self.numpy.kind != "i":
            return self.quantize(values, scale)
        found: Array = np.clip(np.rint(values / scale.astype(np.float32)), -self.largest - 1, self.largest)
        return found.astype(self.numpy)


INT8 = Levels("int8", onnx.TensorProto.INT8, LEVELS, since=13)
FP8 = Levels("fp8", onnx.TensorProto.FLOAT8E4M3FN, 448.0, since=19)
"""E4M3: four bits of exponent, three of fraction, no infinities."""


def to_levels(values: Array, reach: Array) -> Array:
    """`values` on the levels from -reach to reach, as floats; `reach` broadcasts."""
    step = np.where(reach > 0, reach, LEVELS) / np.float32(LEVELS)
    levels: Array = np.clip(np.rint(values / step), -LEVELS, LEVELS) * step
    return levels
