"""The pass `fuse-add-rms-norm-quantize`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from llmc.passes.base import Context, PassResult
from llmc.passes.fuse import quantized_outputs as quantized
from llmc.passes.graph import DOMAIN, Graph, Tensor, shape_of
from llmc.passes.plugins import PluginPass
from llmc.passes.rewrite import Attribute, Rewrite, RewritePass, Scalar, Weight

WIDEST = 8192
"""Values of a row that the kernels keep in registers."""


class _AddNormQuantize(Rewrite):
    """What both normalizations share."""

    dtypes = ("float32",)  # of 16 bits levels are rounded otherwise, which has a test of its own

    def problem(self, x: Tensor, residual: Tensor, weight: Tensor, axis: int, zero_point: Any) -> str | None:
        shape = shape_of(x) or ()
        if axis not in (-1, len(shape) - 1):
            return "the normalization is over more than the last axis"
        width = (shape_of(weight) or (None,))[-1]
        if len(shape_of(weight) or ()) != 1 or not isinstance(width, int) or width > WIDEST:
            return f"its rows are of {width} values; the kernel takes up to {WIDEST}"
        return quantized.problem_of_shapes(x, residual) or quantized.problem(zero_point)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        shape = tuple(int(n) for n in rng.integers(2, 9, 3))
        values = {"x": shape, "residual": shape, "weight": shape[-1:], "bias": shape[-1:], "axis": -1, "epsilon": 1e-5}
        return {p.name: (values | quantized.EXAMPLE)[p.name] for p in self.parameters}


class AddRMSNormQuantize(_AddNormQuantize):
    """QuantizeLinear(RMSNormalization(x + residual)), and the sum."""

    opset = since = 23

    def pattern(
        self, op: Any, x: Any, residual: Any, weight: Weight, axis: Attribute, epsilon: Attribute, scale: Scalar,
        zero_point: Weight,
    ) -> Any:  # fmt: skip
        total = op.Add(x, residual)
        normal = op.RMSNormalization(total, weight, axis=axis, epsilon=epsilon)
        return op.QuantizeLinear(normal, scale, zero_point), total

    def check(self, x: Any, residual: Any, weight: Any, axis: Any, zero_point: Any) -> str | None:
        return self.problem(x, residual, weight, axis, zero_point)

    def replace(self, op: Any, x: Any, residual: Any, weight: Any, epsilon: Any, scale: Any, zero_point: Any) -> Any:
        total, made = op.AddRMSNormQuantize(
            x, residual, weight, *quantized.constants(scale, zero_point).values(),
            outputs=2, domain=DOMAIN, epsilon=epsilon,
        )  # fmt: skip
        return made, total


class AddLayerNormQuantize(_AddNormQuantize):
    """QuantizeLinear(LayerNormalization(x + residual)), and the sum."""

    opset = since = 19

    def pattern(
        self, op: Any, x: Any, residual: Any, weight: Weight, bias: Weight, axis: Attribute, epsilon: Attribute,
        scale: Scalar, zero_point: Weight,
    ) -> Any:  # fmt: skip
        total = op.Add(x, residual)
        normal = op.LayerNormalization(total, weight, bias, axis=axis, epsilon=epsilon)
        return op.QuantizeLinear(normal, scale, zero_point), total

    def check(self, x: Any, residual: Any, weight: Any, axis: Any, zero_point: Any) -> str | None:
        return self.problem(x, residual, weight, axis, zero_point)

    def replace(
        self, op: Any, x: Any, residual: Any, weight: Any, bias: Any, epsilon: Any, scale: Any, zero_point: Any
    ) -> Any:
        total, made = op.AddLayerNormQuantize(
            x, residual, weight, bias, *quantized.constants(scale, zero_point).values(),
            outputs=2, domain=DOMAIN, epsilon=epsilon,
        )  # fmt: skip
        return made, total


class FuseAddRMSNormQuantize(PluginPass, RewritePass):
    """Fuses a residual sum, its normalization and its quantization to AddRMSNormQuantize, for llmc's plugin.

    x and residual [..., D] of one shape, D up to 8192; weight [D]; scale and zero point 0 constants, the zero point
    int8 or float8e4m3fn: `QuantizeLinear(RMSNormalization(Add(x, residual), weight), scale, zero)` → llmc
    AddRMSNormQuantize, which gives the sum too; with LayerNormalization and its bias [D] → AddLayerNormQuantize. The
    body of standard operators goes with the model.

    **Safety:** tolerance; normalized values are not rounded to 16 bits before they are quantized: a level may be
    the next one.

    Source: kernels/add_rmsnorm_quantize and kernels/add_layernorm_quantize.
    """

    after: ClassVar = (
        "fuse-rms-norm",
        "fuse-layer-norm",
        "quantize-int8",
        "quantize-fp8",
        "convert-fp16",
        "convert-bf16",
    )
    safety: ClassVar = "tolerance"
    rules: ClassVar = (AddRMSNormQuantize(), AddLayerNormQuantize())

    def run(self, graph: Graph, context: Context) -> PassResult:
        self.needs_plugin()
        return super().run(graph, context)
