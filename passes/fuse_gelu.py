"""The pass `fuse-gelu`."""

from __future__ import annotations

from typing import Any, ClassVar

from llmc.passes.rewrite import Rewrite, RewritePass


class GeluFromErf(Rewrite):
    """0.5 · x · (1 + erf(x / √2)), in each order of its products."""

    opset = 20

    def pattern(self, op: Any, x: Any) -> Any:
        cdf = op.Add(op.Erf(op.either(op.Div(x, 2**0.5), op.Mul(x, 0.5**0.5))), 1.0)
        return op.either(op.Mul(op.Mul(x, cdf), 0.5), op.Mul(op.Mul(x, 0.5), cdf), op.Mul(x, op.Mul(cdf, 0.5)))

    def replace(self, op: Any, x: Any) -> Any:
        return op.Gelu(x, approximate="none")


class FuseGelu(RewritePass):
    """Fuses the exact GELU, spelled out with Erf, to one Gelu node.

    x [any shape], float16, bfloat16, float32 or float64:
    `Mul(Mul(x, Add(Erf(Div(x, 1.41421)), 1)), 0.5)` → `Gelu(x, approximate="none")`, the products in any order.

    **Safety:** tolerance; the same function, rounded fewer times (float32: 1e-6 of the largest value).

    Source: ONNX operator Gelu-20; Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.
    """

    safety: ClassVar = "tolerance"
    rules: ClassVar = (GeluFromErf(),)
