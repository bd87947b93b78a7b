"""The pass `fuse-swish`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import onnx
from pydantic import Field

from llmc.passes.graph import Graph, onnx_dtype
from llmc.passes.rewrite import NEWEST_OPSET, Attribute, Rewrite, RewritePass, Scalar

_RAISED_FROM = 23
"""Attention, RMSNormalization and RotaryEmbedding are of opset 23: graphs with them are for late runtimes already."""


class _ToSwish(Rewrite):
    """ONNX Runtime has no kernel for Swish: it takes the function's body, which ONNX gives for opset 24 alone.

    Constant and CastLike, of which the body is made, are others from opset 25 on.
    """

    opset = newest_opset = 24
    too_new = "above 24 no runtime can spell Swish out: its definition is made of operators as they were then"


class SwishPlain(_ToSwish):
    """x · sigmoid(x): SiLU."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x))

    def replace(self, op: Any, x: Any) -> Any:
        return op.Swish(x)


class SwishFromExp(SwishPlain):
    """x / (1 + e⁻ˣ)."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Div(x, op.Add(op.Exp(op.Neg(x)), 1.0))


class SwishAlpha(_ToSwish):
    """x · sigmoid(α · x): quick GELU where α is 1.702."""

    def pattern(self, op: Any, x: Any, alpha: Scalar) -> Any:
        return op.Mul(x, op.Sigmoid(op.Mul(x, alpha)))

    def replace(self, op: Any, x: Any, alpha: Any) -> Any:
        return op.Swish(x, alpha=alpha)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        return super().example(rng) | {"alpha": float(rng.choice([1.702, 0.5, -1.0]))}


class _WithoutBfloat16(Rewrite):
    """HardSwish and Mish take bfloat16 from opset 22 only."""

    dtypes = ("float32", "float16")

    def problem(self, x: Any) -> str | None:
        if onnx_dtype(x) == onnx.TensorProto.BFLOAT16:
            return f"'{x.name}' is bfloat16, which the fused operator does not take in every opset"
        return None


class HardSwishFromHardSigmoid(_WithoutBfloat16):
    """x · hard_sigmoid(x)."""

    opset = 14

    def pattern(self, op: Any, x: Any, alpha: Attribute, beta: Attribute) -> Any:
        return op.Mul(x, op.HardSigmoid(x, alpha=alpha, beta=beta))

    def check(self, x: Any, alpha: Any, beta: Any) -> str | None:
        if abs(alpha - 1 / 6) > 1e-6 or abs(beta - 0.5) > 1e-6:
            return f"HardSigmoid has alpha {alpha:.6g} and beta {beta:.6g}, HardSwish needs 0.166667 and 0.5"
        return self.problem(x)

    def replace(self, op: Any, x: Any) -> Any:
        return op.HardSwish(x)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        return super().example(rng) | {"alpha": 1 / 6, "beta": 0.5}


class HardSwishFromClip(_WithoutBfloat16):
    """x · clip(x + 3, 0, 6) / 6."""

    opset = 14

    def clipped(self, op: Any, shifted: Any) -> Any:
        return op.Clip(shifted, min=0.0, max=6.0)

    def pattern(self, op: Any, x: Any) -> Any:
        clipped = self.clipped(op, op.Add(x, 3.0))
        return op.either(
            op.Div(op.Mul(x, clipped), 6.0),
            op.Mul(op.Mul(x, clipped), 1 / 6),
            op.Mul(x, op.Div(clipped, 6.0)),
            op.Mul(x, op.Mul(clipped, 1 / 6)),
        )

    def check(self, x: Any) -> str | None:
        return self.problem(x)

    def replace(self, op: Any, x: Any) -> Any:
        return op.HardSwish(x)


class HardSwishFromMin(HardSwishFromClip):
    """x · min(relu(x + 3), 6) / 6."""

    def clipped(self, op: Any, shifted: Any) -> Any:
        return op.Min(op.either(op.Relu(shifted), op.Max(shifted, 0.0)), 6.0)


class MishFromSoftplus(_WithoutBfloat16):
    """x · tanh(ln(1 + eˣ))."""

    opset = 18

    def pattern(self, op: Any, x: Any) -> Any:
        softplus = op.either(op.Softplus(x), op.Log(op.Add(op.Exp(x), 1.0)))
        return op.Mul(x, op.Tanh(softplus))

    def check(self, x: Any) -> str | None:
        return self.problem(x)

    def replace(self, op: Any, x: Any) -> Any:
        return op.Mish(x)


class FuseSwish(RewritePass):
    """Fuses x · sigmoid(α · x) to Swish, and its relatives to HardSwish and Mish.

    x [any shape], float16, bfloat16, float32 or float64 (HardSwish and Mish: not bfloat16):
    `Mul(x, Sigmoid(x))` → `Swish(x)`; `Mul(x, Sigmoid(Mul(x, α)))` → `Swish(x, alpha=α)`, quick GELU with α = 1.702;
    `Mul(x, HardSigmoid(x, alpha=1/6, beta=1/2))` and `Div(Mul(x, Clip(Add(x, 3), 0, 6)), 6)` → `HardSwish(x)`;
    `Mul(x, Tanh(Softplus(x)))` → `Mish(x)`.

    Swish came with opset 24, to which a graph of 23, which is for late runtimes already, is raised. One of an older
    opset keeps Mul and Sigmoid unless it may be raised: TensorRT makes one kernel of both forms, and older runtimes do
    not read opset 24. One of a newer opset keeps them too: ONNX Runtime has no kernel for Swish, and above opset 24
    ONNX gives it no body to take instead.

    **Safety:** tolerance; the same function, rounded fewer times (float32: 1e-6 of the largest value).

    Source: ONNX operators Swish-24, HardSwish-14, Mish-18; Ramachandran, Zoph and Le, Searching for Activation
    Functions, 2017; Howard et al., Searching for MobileNetV3, 2019; Misra, Mish, 2019.
    """

    after: ClassVar = ("fold-constants",)
    safety: ClassVar = "tolerance"

    raise_opset: bool = Field(
        False, description="Raise a graph of any older opset, not of 23 alone, to 24 where that makes room for Swish."
    )

    rules: ClassVar = (
        HardSwishFromHardSigmoid(),
        HardSwishFromClip(),
        HardSwishFromMin(),
        MishFromSoftplus(),
        SwishPlain(),
        SwishFromExp(),
        SwishAlpha(),
    )

    def newest_opset(self, graph: Graph) -> int:
        return NEWEST_OPSET if self.raise_opset or graph.opset >= _RAISED_FROM else MishFromSoftplus.opset
