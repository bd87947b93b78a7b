"""The pass `fuse-layer-norm`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from llmc.passes.graph import Tensor, shape_of
from llmc.passes.rewrite import Attribute, Rewrite, RewritePass, Scalar, Weight


class _LayerNorm(Rewrite):
    """What the three spellings share: the normalised part, and when it is LayerNormalization's."""

    opset = 17

    def normalised(self, op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
        centred = op.Sub(x, op.ReduceMean(x, axes=axes))
        variance = op.ReduceMean(op.either(op.Pow(centred, 2), op.Mul(centred, centred)), axes=axes)
        deviation = op.Sqrt(op.Add(variance, epsilon))
        return op.either(op.Div(centred, deviation), op.Mul(centred, op.Reciprocal(deviation)))

    def problem(self, x: Tensor, axes: list[int] | None, *affine: Tensor) -> str | None:
        shape = shape_of(x)
        if shape is None:
            return f"the rank of '{x.name}' is not known"
        normalised = _normalised_shape(shape, axes)
        if normalised is None:
            return f"the mean is over axes {axes} of '{x.name}', not over its last ones"
        for tensor in affine:
            if shape_of(tensor) != normalised:
                return f"'{tensor.name}' has shape {list(tensor.shape)}, LayerNormalization needs {list(normalised)}"
        return None

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        count = int(rng.integers(1, 3))
        # Over two or three values the variance may be next to nothing, and the quotient all rounding.
        shape = (*(int(n) for n in rng.integers(1, 4, 2)), *(int(n) for n in rng.integers(8, 17, count)))
        values = {
            "x": shape,
            "axes": list(range(-count, 0)),
            "epsilon": float(rng.choice([1e-12, 1e-5, 1e-3])),
            "scale": shape[-count:],
            "bias": shape[-count:],
        }
        return {p.name: values[p.name] for p in self.parameters}


class LayerNormAffine(_LayerNorm):
    """(x − mean) / √(variance + ε) · scale + bias."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar, scale: Weight, bias: Weight) -> Any:
        return op.Add(op.Mul(self.normalised(op, x, axes, epsilon), scale), bias)

    def check(self, x: Any, axes: Any, epsilon: Any, scale: Any, bias: Any) -> str | None:
        return self.problem(x, axes, scale, bias)

    def replace(self, op: Any, x: Any, axes: Any, epsilon: Any, scale: Any, bias: Any) -> Any:
        return op.LayerNormalization(x, scale, bias, axis=-len(axes), epsilon=epsilon)


class LayerNormScale(_LayerNorm):
    """(x − mean) / √(variance + ε) · scale."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar, scale: Weight) -> Any:
        return op.Mul(self.normalised(op, x, axes, epsilon), scale)

    def check(self, x: Any, axes: Any, epsilon: Any, scale: Any) -> str | None:
        return self.problem(x, axes, scale)

    def replace(self, op: Any, x: Any, axes: Any, epsilon: Any, scale: Any) -> Any:
        return op.LayerNormalization(x, scale, axis=-len(axes), epsilon=epsilon)


class LayerNormPlain(_LayerNorm):
    """(x − mean) / √(variance + ε)."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar) -> Any:
        return self.normalised(op, x, axes, epsilon)

    def check(self, x: Any, axes: Any, epsilon: Any) -> str | None:
        problem = self.problem(x, axes)
        if problem is None and not all(isinstance(n, int) for n in x.shape[-len(axes) :]):
            return f"the normalised dimensions of '{x.name}', {list(x.shape)}, are not all static"
        return problem

    def replace(self, op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
        ones = np.ones(x.shape[-len(axes) :], dtype=x.dtype)
        return op.LayerNormalization(x, ones, axis=-len(axes), epsilon=epsilon)


def _normalised_shape(shape: tuple[Any, ...], axes: list[int] | None) -> tuple[Any, ...] | None:
    """The sizes of the last axes, where `axes` names just these; None where it names others."""
    if not axes or sorted(a % len(shape) for a in axes) != list(range(len(shape) - len(axes), len(shape))):
        return None
    return shape[-len(axes) :]


class FuseLayerNorm(RewritePass):
    """Fuses layer normalisation, spelled out with ReduceMean, to one LayerNormalization node.

    x [..., n₁ … nₖ], float16, bfloat16, float32 or float64; scale and bias constants [n₁ … nₖ]:
    `Add(Mul(Div(Sub(x, m), Sqrt(Add(ReduceMean(Pow(Sub(x, m), 2)), ε))), scale), bias)` with m = ReduceMean(x) over
    the last k axes → `LayerNormalization(x, scale, bias, axis=-k)`; also without bias, and without both.
    The fused node computes mean and variance in float32 whatever x is, which cures the FP16 overflow of the square.

    **Safety:** tolerance; the same function, rounded fewer times (float32: 1e-5 of the largest value).

    Source: ONNX operator LayerNormalization-17; Ba, Kiros and Hinton, Layer Normalization, 2016.
    """

    after: ClassVar = ("fold-constants",)
    safety: ClassVar = "tolerance"
    rules: ClassVar = (LayerNormAffine(), LayerNormScale(), LayerNormPlain())
