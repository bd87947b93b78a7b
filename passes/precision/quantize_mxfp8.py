"""MXFP8 arithmetic, by QuantizeLinear and DequantizeLinear nodes in blocks around the tensors that it multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from llmc.passes.base import Context, Safety
from llmc.passes.graph import Graph, Variable
from llmc.passes.precision.block_formats import MXFP8
from llmc.passes.precision.quantize_blocks import Inserter, QuantizeBlocks
from llmc.passes.precision.weight_sites import WeightSite


class QuantizeMxfp8(QuantizeBlocks):
    """Multiply in MXFP8: 8-bit floats (E4M3) with a power of two (E8M0) for every 32 of them; no calibration data.

    MatMul, Gemm (x: float [..., K], W: constant [K, N]) → the same with
    W: float8e4m3fn constant → DequantizeLinear(W, s, axis=0, block_size=32), s float8e8m0 [K / 32, N], and
    x: QuantizeLinear(x, s, axis=-1, block_size=32) float8e4m3fn → DequantizeLinear, where s float8e8m0 [..., K / 32]
    is made as it runs: amax of the block / 448, rounded up to a power of two. The graph is raised to opset 24.
    With `activations: false` it multiplies in the type of the model.

    TensorRT-RTX 1.7 takes no E8M0 constants, and what its own operators (`TRT_MXFP8DynamicQuantize`) quantize it
    dequantizes and multiplies in float16: `quantize-fp8` is what it computes with.

    **Safety:** lossy. Rounding moves each value by at most 2^-4 of itself, and small ones by at most 2^-17 of the
    largest of their block.

    Source: ONNX operator specification, QuantizeLinear-24 and DequantizeLinear-24; Open Compute Project, "Microscaling
    Formats (MX) Specification" 1.0.
    """

    targets: ClassVar[tuple[str, ...]] = ("onnx",)
    targets_reason: ClassVar[str] = (
        "TensorRT-RTX 1.7 has no MXFP8 product: it dequantizes, and multiplies in float16; ONNX Runtime has no kernels "
        "for E8M0 scales; quantize-fp8 is what TensorRT multiplies in"
    )
    safety: ClassVar[Safety] = "lossy"
    format: ClassVar = MXFP8

    def reach(self, graph: Graph, sites: list[WeightSite], context: Context) -> Mapping[str, float]:  # noqa: ARG002
        return {}

    def block_scales(self, insert: Inserter, site: WeightSite, amax: Variable, reach: float) -> Variable:  # noqa: ARG002
        """amax / 448, up to a power of two."""
        name = f"{site.activation.name}_mxfp8"
        exact = Variable(insert.fresh(f"{name}_exact"), amax.dtype, amax.shape)
        insert.add("Div", site.node, [amax, insert.scalar(f"{name}_largest", MXFP8.largest, site)], exact)
        stored = Variable(insert.fresh(f"{name}_scale"), np.dtype(MXFP8.numpy_scale), amax.shape)
        return insert.add("Cast", site.node, [exact], stored, to=MXFP8.scale_dtype, round_mode="up")
