"""FP8 arithmetic, by QuantizeLinear and DequantizeLinear nodes around the tensors that it multiplies."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from llmc.passes.base import Safety
from llmc.passes.precision.calibration import Clipping
from llmc.passes.precision.levels import FP8
from llmc.passes.precision.quantize_products import QuantizeProducts


class Reach(Clipping):
    """Where the scales of activations come from. FP8 is as exact near 0 as far from it: clipping gains little."""

    method: Literal["minmax", "percentile"] = Field("minmax", description="How to choose where activations clip.")


class QuantizeFp8(QuantizeProducts):
    """Multiply in FP8 (E4M3): static scales, per-channel weights, per-tensor activations.

    MatMul, Gemm, Conv, ConvTranspose (x: float, W: constant) → the same with
    x: QuantizeLinear(x, s, 0) float8e4m3fn → DequantizeLinear, s [] = amax(x) / 448 from calibration data, and
    W: float8e4m3fn constant → DequantizeLinear(W, s, 0, axis), s [channels] = amax(W, channel) / 448.
    Else as `quantize-int8`: scales of the tensor's own type, rounded up to float16 values; one Q/DQ pair for all
    consumers of an activation. The graph is raised to opset 19. TensorRT takes FP8 on SM89 and from SM120 on.

    **Safety:** lossy. Rounding moves each value by at most 2^-4 of itself, and values below 2^-6 of a scale by at most
    2^-10 of it; beyond the calibrated range it clips.

    Source: ONNX operator specification, QuantizeLinear and DequantizeLinear; Micikevicius et al., "FP8 Formats for
    Deep Learning" (2022); TensorRT developer guide, "Working with Quantized Types".
    """

    safety: ClassVar[Safety] = "lossy"
    levels: ClassVar = FP8

    correct_bias: bool = Field(
        False, description="Take the mean error of each output channel, on the calibration data, out of the bias."
    )
    calibration: Reach = Field(Reach(), description="Where the scales of activations come from.")
