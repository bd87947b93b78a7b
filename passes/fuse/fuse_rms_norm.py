"""The pass `fuse-rms-norm`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import onnx

from llmc.passes.fuse import normalised_axes as last
from llmc.passes.graph import Tensor, dtype_name
from llmc.passes.rewrite import Attribute, Rewrite, RewritePass, Scalar, Weight

FLOAT = onnx.TensorProto.FLOAT


class _RMSNorm(Rewrite):
    """What the spellings share: the normalised part, and an example of it."""

    opset = 23

    def normalised(self, op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
        """x / √(mean(x²) + ε), each way in which exporters write the quotient."""
        square = op.Add(op.ReduceMean(op.either(op.Pow(x, 2), op.Mul(x, x)), axes=axes), epsilon)
        root = op.Sqrt(square)
        return op.either(
            op.Mul(x, op.Reciprocal(root)),
            op.Mul(x, op.Div(1.0, root)),
            op.Mul(x, op.Pow(square, -0.5)),
            op.Div(x, root),
            op.Div(x, op.Pow(square, 0.5)),
        )

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        count = int(rng.integers(1, 3))
        shape = (*(int(n) for n in rng.integers(1, 4, 2)), *(int(n) for n in rng.integers(4, 9, count)))
        values = {
            "x": shape,
            "axes": list(range(-count, 0)),
            "epsilon": float(rng.choice([1e-6, 1e-5, 1e-3])),
            "scale": shape[-count:],
        }
        return {p.name: values[p.name] for p in self.parameters}


class RMSNormScale(_RMSNorm):
    """x / √(mean(x²) + ε) · scale."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar, scale: Weight) -> Any:
        return op.Mul(self.normalised(op, x, axes, epsilon), scale)

    def check(self, x: Any, axes: Any, scale: Any) -> str | None:
        return _centred(x) or last.problem(x, axes, scale)

    def replace(self, op: Any, x: Any, axes: Any, epsilon: Any, scale: Any) -> Any:
        return op.RMSNormalization(x, last.affine(scale, x, axes), axis=-len(axes), epsilon=epsilon)


class RMSNormPlain(_RMSNorm):
    """x / √(mean(x²) + ε)."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar) -> Any:
        return self.normalised(op, x, axes, epsilon)

    def check(self, x: Any, axes: Any) -> str | None:
        return _centred(x) or last.problem(x, axes)

    def replace(self, op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
        return op.RMSNormalization(x, last.ones(x, axes), axis=-len(axes), epsilon=epsilon)


def _centred(x: Tensor) -> str | None:
    """Whether x is z − mean(z), so that this is the second half of a layer normalisation."""
    producer = x.inputs[0] if x.inputs else None
    if producer is None or producer.op != "Sub" or not any(n.op == "ReduceMean" for n in producer.inputs[1].inputs):
        return None
    return f"'{x.name}' is centred: a layer normalisation, which fuse-layer-norm takes"


class _Widened(_RMSNorm):
    """x of 16 bits, normalised in float32 between casts: what RMSNormalization does by itself."""

    def __init__(self, half: int) -> None:
        self.half = half
        self.dtypes = (dtype_name(half),)  # type: ignore[misc]  # of this instance

    def widened(self, op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
        return self.normalised(op, op.Cast(x, to=FLOAT), axes, epsilon)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        return super().example(rng) | {"epsilon": np.float32(1e-5)}


class RMSNormWidened(_Widened):
    """Cast(Cast(x) / √(mean(Cast(x)²) + ε)) · scale, the scale in 16 bits: Llama, T5."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar, scale: Weight) -> Any:
        return op.Mul(op.Cast(self.widened(op, x, axes, epsilon), to=self.half), scale)

    def check(self, x: Any, axes: Any, scale: Any) -> str | None:
        return last.problem_of_casts(x, self.half) or last.problem(x, axes, scale)

    replace = RMSNormScale.replace


class RMSNormWidenedScale(_Widened):
    """Cast(Cast(x) / √(mean(Cast(x)²) + ε) · scale), the scale in float32 too: Gemma, where it is 1 + w."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar, scale: Weight) -> Any:
        return op.Cast(op.Mul(self.widened(op, x, axes, epsilon), scale), to=self.half)

    def check(self, x: Any, axes: Any, scale: Any) -> str | None:
        problem = last.problem_of_casts(x, self.half) or last.problem(x, axes, scale)
        return problem or last.problem_of_narrowing(self.half, scale)

    def replace(self, op: Any, x: Any, axes: Any, epsilon: Any, scale: Any) -> Any:
        return op.RMSNormalization(x, last.affine(scale, x, axes, self.half), axis=-len(axes), epsilon=epsilon)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        values = super().example(rng)
        # Quarters are exact in every floating type.
        return values | {"scale": rng.integers(-8, 9, values["scale"]).astype(np.float32) / 4}


class RMSNormWidenedPlain(_Widened):
    """Cast(Cast(x) / √(mean(Cast(x)²) + ε))."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar) -> Any:
        return op.Cast(self.widened(op, x, axes, epsilon), to=self.half)

    def check(self, x: Any, axes: Any) -> str | None:
        return last.problem_of_casts(x, self.half) or last.problem(x, axes)

    replace = RMSNormPlain.replace


class FuseRMSNorm(RewritePass):
    """Fuses root mean square normalisation, spelled out with ReduceMean, to one RMSNormalization node.

    x [..., n₁ … nₖ], float16, bfloat16 or float32; scale constant [n₁ … nₖ]:
    `Mul(Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), ε)))), scale)`, the mean over the last k axes →
    `RMSNormalization(x, scale, axis=-k)`; also without scale, with x·x, Div or Pow(…, -0.5). Casts of a 16-bit x to
    float32 and back around it go too. Where the scale is applied before the cast back (Gemma's 1 + w, folded), and
    rounding it to 16 bits would change it, the casts stay around a float32 node. float64 stays as it is: the operator
    would compute it in float32.

    **Safety:** tolerance; the same function, rounded fewer times (float32: 1e-5 of the largest value).

    Source: ONNX operator RMSNormalization-23; Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """

    after: ClassVar = ("fold-constants", "fuse-layer-norm")
    safety: ClassVar = "tolerance"
    rules: ClassVar = (
        *(rule(half) for half in last.HALVES for rule in (RMSNormWidened, RMSNormWidenedScale)),
        *(RMSNormWidenedPlain(half) for half in last.HALVES),
        RMSNormScale(),
        RMSNormPlain(),
    )
