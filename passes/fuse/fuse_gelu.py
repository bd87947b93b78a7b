"""The pass `fuse-gelu`."""

from __future__ import annotations

from math import pi, sqrt
from typing import Any, ClassVar

from llmc.passes.rewrite import Rewrite, RewritePass


def _halved(op: Any, x: Any, doubled: Any) -> Any:
    """0.5 · x · doubled, in each order of its products."""
    return op.either(op.Mul(op.Mul(x, doubled), 0.5), op.Mul(op.Mul(x, 0.5), doubled), op.Mul(x, op.Mul(doubled, 0.5)))


class GeluFromErf(Rewrite):
    """0.5 · x · (1 + erf(x / √2)), in each order of its products."""

    opset = 20

    def pattern(self, op: Any, x: Any) -> Any:
        doubled = op.Add(op.Erf(op.either(op.Div(x, 2**0.5), op.Mul(x, 0.5**0.5))), 1.0)
        return _halved(op, x, doubled)

    def replace(self, op: Any, x: Any) -> Any:
        return op.Gelu(x, approximate="none")


class GeluFromTanh(Rewrite):
    """0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), in each order of its products."""

    opset = 20

    def pattern(self, op: Any, x: Any) -> Any:
        cubic, scale = 0.044715, sqrt(2 / pi)
        inner = op.either(
            op.Mul(op.Add(x, op.Mul(op.Pow(x, 3), cubic)), scale),
            op.Mul(op.Add(x, op.Mul(op.Mul(op.Mul(x, x), x), cubic)), scale),
            op.Mul(op.Mul(x, scale), op.Add(op.Mul(op.Mul(x, cubic), x), 1.0)),
            op.Mul(op.Mul(x, scale), op.Add(op.Mul(op.Mul(x, x), cubic), 1.0)),
            op.Mul(op.Mul(x, op.Add(op.Mul(op.Mul(x, x), cubic), 1.0)), scale),
        )
        return _halved(op, x, op.Add(op.Tanh(inner), 1.0))

    def replace(self, op: Any, x: Any) -> Any:
        return op.Gelu(x, approximate="tanh")


class FuseGelu(RewritePass):
    """Fuses GELU, spelled out with Erf or Tanh, to one Gelu node.

    x [any shape], float16, bfloat16, float32 or float64:
    `Mul(Mul(x, Add(Erf(Div(x, 1.41421)), 1)), 0.5)` → `Gelu(x, approximate="none")`, and
    `Mul(Mul(x, Add(Tanh(Mul(Add(x, Mul(Pow(x, 3), 0.044715)), 0.797885)), 1)), 0.5)` → `Gelu(x, approximate="tanh")`,
    the products in any order, the cube also as x·x·x. What is called quick GELU, x · sigmoid(1.702 · x), is Swish.

    **Safety:** tolerance; the same function, rounded fewer times (float32: 1e-6 of the largest value).

    Source: ONNX operator Gelu-20; Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.
    """

    safety: ClassVar = "tolerance"
    rules: ClassVar = (GeluFromErf(), GeluFromTanh())
