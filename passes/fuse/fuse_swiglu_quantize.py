"""The pass `fuse-swiglu-quantize`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from llmc.passes.base import Context, PassResult
from llmc.passes.fuse import quantized_outputs as quantized
from llmc.passes.graph import DOMAIN, Graph
from llmc.passes.plugins import PluginPass
from llmc.passes.rewrite import Rewrite, RewritePass, Scalar, Weight


class SwiGLUQuantize(Rewrite):
    """QuantizeLinear(SiLU(gate) · up)."""

    opset = 19
    since = 24
    dtypes = ("float32",)  # of 16 bits levels are rounded otherwise, which has a test of its own

    def pattern(self, op: Any, gate: Any, up: Any, scale: Scalar, zero_point: Weight) -> Any:
        silu = op.either(op.Swish(gate), op.Mul(gate, op.Sigmoid(gate)))
        return op.QuantizeLinear(op.Mul(silu, up), scale, zero_point)

    def check(self, gate: Any, up: Any, zero_point: Any) -> str | None:
        return quantized.problem_of_shapes(gate, up) or quantized.problem(zero_point)

    def replace(self, op: Any, gate: Any, up: Any, scale: Any, zero_point: Any) -> Any:
        return op.SwiGLUQuantize(gate, up, *quantized.constants(scale, zero_point).values(), domain=DOMAIN)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        shape = tuple(int(n) for n in rng.integers(2, 9, 3))
        return {"gate": shape, "up": shape, **quantized.EXAMPLE}


class FuseSwigluQuantize(PluginPass, RewritePass):
    """Fuses SiLU(gate) · up and its quantization to SwiGLUQuantize, for llmc's plugin.

    gate and up of one shape; scale and zero point 0 constants, the zero point int8 or float8e4m3fn:
    `QuantizeLinear(Mul(Swish(gate), up), scale, zero)` → llmc SwiGLUQuantize; also with Mul and Sigmoid for Swish. The
    body of standard operators goes with the model.

    **Safety:** tolerance; the product is not rounded to 16 bits before it is quantized: a level may be the next one.

    Source: kernels/swiglu_quantize; Shazeer, GLU Variants Improve Transformer, 2020.
    """

    after: ClassVar = ("fuse-swish", "quantize-int8", "quantize-fp8", "convert-fp16", "convert-bf16")
    safety: ClassVar = "tolerance"
    rules: ClassVar = (SwiGLUQuantize(),)

    def run(self, graph: Graph, context: Context) -> PassResult:
        self.needs_plugin()
        return super().run(graph, context)
