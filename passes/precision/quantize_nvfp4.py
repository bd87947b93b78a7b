"""NVFP4 arithmetic, by QuantizeLinear and DequantizeLinear nodes in blocks around the tensors that it multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field

from llmc.passes.base import Context, LlmcError, Need, Safety
from llmc.passes.graph import Constant, Graph, Variable
from llmc.passes.precision.block_formats import E4M3, NVFP4, SMALLEST_E4M3, tensor_scale
from llmc.passes.precision.calibration import Calibration
from llmc.passes.precision.quantize_blocks import Inserter, QuantizeBlocks
from llmc.passes.precision.weight_sites import WeightSite


class QuantizeNvfp4(QuantizeBlocks):
    """Multiply in NVFP4: 4-bit floats (E2M1), a scale (E4M3) for every 16 of them, and one for the whole tensor.

    MatMul, Gemm (x: float [..., K], W: constant [K, N]) → the same with
    W: float4e2m1 constant → DequantizeLinear(W, s, axis=0, block_size=16), where
    s [K / 16, N] = DequantizeLinear(E4M3 constant, g), and
    x: QuantizeLinear(x, s, axis=-1, block_size=16) float4e2m1 → DequantizeLinear, where s [..., K / 16] is made as it
    runs: amax of the block → QuantizeLinear(amax, 6 g) E4M3 → DequantizeLinear(g). The g of an activation comes from
    calibration data; all are powers of two, so that every scale, and every weight, is exact in float16 and bfloat16.
    Scales of weights are those of least square error. The graph is raised to opset 23. TensorRT takes NVFP4 from SM120
    on, as these standard operators. With `activations: false` it multiplies in the type of the model.

    **Safety:** lossy. A value moves by at most 3/17 of the largest of its block, and 5/17 in a weight, whose blocks are
    clipped where their other values gain by it; in blocks below 2^-12 of the tensor's largest value, or 2^-18, by more.

    Source: ONNX operator specification, QuantizeLinear-23 and DequantizeLinear-23; NVIDIA et al., "Pretraining Large
    Language Models with NVFP4" (2025), for the two levels of scales; TensorRT developer guide, "Working with Quantized
    Types".
    """

    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    targets: ClassVar[tuple[str, ...]] = ("tensorrt-rtx", "tensorrt", "onnx")
    targets_reason: ClassVar[str] = "ONNX Runtime has no kernels for 4-bit floats"
    safety: ClassVar[Safety] = "lossy"
    format: ClassVar = NVFP4

    calibration: Calibration = Field(Calibration(), description="Where the reach of activations comes from.")

    def reach(self, graph: Graph, sites: list[WeightSite], context: Context) -> Mapping[str, float]:
        if context.activations is None:
            raise LlmcError(f"{self.key()} needs calibration data: give some with --calibration DATA")
        names = list(dict.fromkeys(site.activation.name for site in sites))
        samples = self.calibration.samples
        return context.activations.amax(graph, names, method="minmax", percentile=100.0, samples=samples)

    def block_scales(self, insert: Inserter, site: WeightSite, amax: Variable, reach: float) -> Variable:
        """E4M3 numbers above 0 times the tensor's scale."""
        name, whole = f"{site.activation.name}_nvfp4", tensor_scale(reach)
        least = insert.scalar(f"{name}_least", NVFP4.largest * whole * SMALLEST_E4M3, site)
        above = insert.add(
            "Max", site.node, [amax, least], Variable(insert.fresh(f"{name}_above"), amax.dtype, amax.shape)
        )
        step = insert.scalar(f"{name}_step", NVFP4.largest * whole, site)
        zero = Constant(insert.fresh(f"{name}_zero_point"), np.asarray(0, E4M3))
        stored = Variable(insert.fresh(f"{name}_scale"), E4M3, amax.shape)
        insert.add("QuantizeLinear", site.node, [above, step, zero], stored)
        return insert.scale_of(stored, whole, site, name)
