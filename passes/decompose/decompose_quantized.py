"""The pass `decompose-quantized`."""

from __future__ import annotations

from typing import ClassVar

from llmc.passes.base import Context, Pass, PassResult
from llmc.passes.decompose.blocks import BLOCKS
from llmc.passes.decompose.families import decompose
from llmc.passes.decompose.integers import INTEGERS
from llmc.passes.decompose.quantized import QUANTIZED
from llmc.passes.decompose.quantized_layers import QUANTIZED_LAYERS
from llmc.passes.graph import Graph

FAMILIES = (BLOCKS, INTEGERS, QUANTIZED, QUANTIZED_LAYERS)
REFUSALS = {
    "DynamicQuantizeLSTM": "ONNX has no LSTM whose weights are quantized inside",
    "MatMulBnb4": "its weights are in 4-bit floating-point tables of bitsandbytes",
    "MatMulFpQ4": "its weights are packed for one processor",
    "MatMulInteger16": "float32 cannot hold its products, and no standard operator has 16-bit factors",
    "QOrderedAttention": "its weights are ordered for one processor",
    "QOrderedGelu": "its data is ordered for one processor",
    "QOrderedLayerNormalization": "its data is ordered for one processor",
    "QOrderedMatMul": "its weights are ordered for one processor",
}
"""Operators that this pass knows, and can do nothing with."""


class DecomposeQuantized(Pass):
    """Spells out quantized operators as QuantizeLinear, DequantizeLinear and operators in floating point.

    `QLinearMatMul(a, sa, za, b, sb, zb, sy, zy)` → `Q(MatMul(DQ(a, sa, za), DQ(b, sb, zb)), sy, zy)`; the same for
    QLinearConv and the QLinear operators of com.microsoft, QGemm, QAttention, MatMulIntegerToFloat.
    `MatMulInteger`, `ConvInteger` → the product in float32, cast to int32 where float32 holds every sum (2^24), or
    not at all where the graph casts it to floating point anyway. DynamicQuantizeLinear → the floating-point operators
    that ONNX defines it by. `MatMulNBits` → `MatMul(A, DequantizeLinear(W))` with W int4 (or int8) in blocks, its
    zero points taken off. Types and zero points otherwise stay: fold-qdq brings them to what TensorRT takes.

    **Safety:** tolerance; integer kernels requantize by other roundings: a level of the output's scale.

    Source: ONNX operators QLinearMatMul, QLinearConv, MatMulInteger, ConvInteger, DynamicQuantizeLinear; ONNX Runtime,
    ContribOperators.md.
    """

    safety: ClassVar = "tolerance"

    def run(self, graph: Graph, context: Context) -> PassResult:
        return decompose(graph, context, FAMILIES, REFUSALS)
