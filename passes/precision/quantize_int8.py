"""INT8 arithmetic, by QuantizeLinear and DequantizeLinear nodes around the tensors that it multiplies."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import ClassVar

from pydantic import Field

from llmc.passes.base import Context, PassResult, Safety
from llmc.passes.graph import Graph, Node
from llmc.passes.precision.insert_qdq import Inserter
from llmc.passes.precision.levels import INT8
from llmc.passes.precision.quantize_products import QuantizeProducts
from llmc.passes.precision.residuals import residuals, share


class QuantizeInt8(QuantizeProducts):
    """Multiply in INT8: static, symmetric, per-channel weights, per-tensor activations.

    MatMul, Gemm, Conv, ConvTranspose (x: float, W: constant) → the same with
    x: QuantizeLinear(x, s, 0) int8 → DequantizeLinear, s [] = amax(x) / 127 from calibration data, and
    W: int8 constant → DequantizeLinear(W, s, 0, axis), s [channels] = amax(W, channel) / 127.
    Zero points are int8 zeros. Scales have the type of the tensor that they quantize, float32 or float16, and are
    rounded up to float16 values, so that a later convert-fp16 moves no grid. One Q/DQ pair serves all consumers of
    an activation. Where a residual connection adds such an activation to what a quantized Conv gives (ResNet,
    MobileNet), the Add reads it from that pair too, so that TensorRT writes and reads it as int8 alone; behind
    attention it does not. What each output channel is off on average goes into the bias, or an Add. A weight behind
    Transpose, Reshape or Cast is quantized as its consumer sees it, with one int8 copy for each channel axis that it
    is used with.

    **Safety:** lossy. Rounding moves each value by at most half a scale; beyond the calibrated range it clips.

    Source: ONNX operator specification, QuantizeLinear and DequantizeLinear; Nagel et al., "Data-Free Quantization
    Through Weight Equalization and Bias Correction" (2019); Jacob et al., "Quantization and
    Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018); Wu et al., "Integer
    Quantization for Deep Learning Inference" (2020); TensorRT developer guide, "Working with Quantized Types".
    """

    safety: ClassVar[Safety] = "lossy"
    levels: ClassVar = INT8

    residuals: bool = Field(
        True, description="Let residual Adds of convolutional nets read int8 too; ONNX Runtime gains nothing by it."
    )

    def _others(self, _graph: Graph) -> list[Node]:
        return [found.node for found in residuals(_graph)] if self.residuals else []

    def _besides(
        self, graph: Graph, quantized: Collection[int], inserter: Inserter, context: Context, result: PassResult
    ) -> None:
        if self.residuals:
            apply = partial(context.apply, result)
            result.near_misses += share(graph, inserter, quantized, self._refusals(graph), apply)
