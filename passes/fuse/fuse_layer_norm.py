"""The pass `fuse-layer-norm`."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx

from llmc.passes.fuse import normalised_axes as last
from llmc.passes.fuse.channel_weights import values_of
from llmc.passes.graph import dtype_name, shape_of
from llmc.passes.rewrite import Attribute, Rewrite, RewritePass, Scalar, Weight

FLOAT = onnx.TensorProto.FLOAT


class _LayerNorm(Rewrite):
    """What the spellings share: the normalised part, and an example of it."""

    opset = 17

    def normalised(self, op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
        """(x − mean) / √(variance + ε), each way in which exporters write the variance and the quotient."""
        mean = op.ReduceMean(x, axes=axes)
        centred = op.Sub(x, mean)
        variance = op.either(
            op.ReduceMean(op.Pow(centred, 2), axes=axes),
            op.ReduceMean(op.Mul(centred, centred), axes=axes),
            op.Sub(op.ReduceMean(op.Mul(x, x), axes=axes), op.Mul(mean, mean)),
            op.Sub(op.ReduceMean(op.Pow(x, 2), axes=axes), op.Pow(mean, 2)),
        )
        square = op.Add(variance, epsilon)
        return op.either(
            op.Div(centred, op.Sqrt(square)),
            op.Mul(centred, op.Reciprocal(op.Sqrt(square))),
            op.Mul(centred, op.Div(1.0, op.Sqrt(square))),
            op.Div(centred, op.Pow(square, 0.5)),
        )

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

    def check(self, x: Any, axes: Any, scale: Any, bias: Any) -> str | None:
        return last.problem(x, axes, scale, bias)

    def replace(self, op: Any, x: Any, axes: Any, epsilon: Any, scale: Any, bias: Any) -> Any:
        scale, bias = (last.affine(tensor, x, axes) for tensor in (scale, bias))
        return op.LayerNormalization(x, scale, bias, axis=-len(axes), epsilon=epsilon)


class LayerNormScale(_LayerNorm):
    """(x − mean) / √(variance + ε) · scale."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar, scale: Weight) -> Any:
        return op.Mul(self.normalised(op, x, axes, epsilon), scale)

    def check(self, x: Any, axes: Any, scale: Any) -> str | None:
        return last.problem(x, axes, scale)

    def replace(self, op: Any, x: Any, axes: Any, epsilon: Any, scale: Any) -> Any:
        return op.LayerNormalization(x, last.affine(scale, x, axes), axis=-len(axes), epsilon=epsilon)


class LayerNormPlain(_LayerNorm):
    """(x − mean) / √(variance + ε)."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar) -> Any:
        return self.normalised(op, x, axes, epsilon)

    def check(self, x: Any, axes: Any) -> str | None:
        return last.problem(x, axes)

    def replace(self, op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
        return op.LayerNormalization(x, last.ones(x, axes), axis=-len(axes), epsilon=epsilon)


class LayerNormBatchStyle(_LayerNorm):
    """x · k + (bias − mean · k) with k = scale / √(variance + ε): Keras through tf2onnx."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar, scale: Weight, bias: Weight) -> Any:
        return _batch_style(op, x, lambda t: op.ReduceMean(t, axes=axes), epsilon, scale, bias)

    check = LayerNormAffine.check
    replace = LayerNormAffine.replace


class LayerNormPooled(_LayerNorm):
    """The same of x [batch, sequence, n], whose means tf2onnx takes with GlobalAveragePool below opset 18."""

    dtypes = ("float32",)

    def pattern(self, op: Any, x: Any, epsilon: Scalar, scale: Weight, bias: Weight) -> Any:
        return _batch_style(op, x, op.GlobalAveragePool, epsilon, scale, bias)

    def check(self, x: Any, scale: Any, bias: Any) -> str | None:
        if shape_of(x) is None or len(x.shape) != 3:
            return f"'{x.name}' is not known to have rank 3, of which GlobalAveragePool takes means along the last axis"
        return last.problem(x, [-1], scale, bias)

    def replace(self, op: Any, x: Any, epsilon: Any, scale: Any, bias: Any) -> Any:
        scale, bias = (last.affine(tensor, x, [-1]) for tensor in (scale, bias))
        return op.LayerNormalization(x, scale, bias, axis=-1, epsilon=epsilon)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        width = int(rng.integers(8, 17))
        return {"x": (2, 3, width), "epsilon": 1e-5, "scale": (width,), "bias": (width,)}


def _batch_style(op: Any, x: Any, mean_of: Any, epsilon: Any, scale: Any, bias: Any) -> Any:
    mean = mean_of(x)
    centred = op.either(op.Sub(x, mean), op.Sub(mean, x))
    variance = mean_of(op.either(op.Mul(centred, centred), op.Pow(centred, 2)))
    factor = op.Mul(op.Reciprocal(op.Sqrt(op.Add(variance, epsilon))), scale)
    return op.Add(op.Mul(x, factor), op.Sub(bias, op.Mul(mean, factor)))


class _Widened(_LayerNorm):
    """x of 16 bits, normalised in float32 between casts: what LayerNormalization does by itself."""

    def __init__(self, half: int) -> None:
        self.half = half
        self.dtypes = (dtype_name(half),)  # type: ignore[misc]  # of this instance

    def widened(self, op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
        wide = op.Cast(x, to=FLOAT)
        centred = op.Sub(wide, op.ReduceMean(wide, axes=axes))
        variance = op.ReduceMean(op.either(op.Pow(centred, 2), op.Mul(centred, centred)), axes=axes)
        deviation = op.Sqrt(op.Add(variance, epsilon))
        return op.either(op.Div(centred, deviation), op.Mul(centred, op.Reciprocal(deviation)))

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        return super().example(rng) | {"epsilon": np.float32(1e-5)}


class LayerNormWidened(_Widened):
    """Cast((Cast(x) − mean) / √(variance + ε)) · scale + bias, the affine part in 16 bits."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar, scale: Weight, bias: Weight) -> Any:
        narrow = op.Cast(self.widened(op, x, axes, epsilon), to=self.half)
        return op.Add(op.Mul(narrow, scale), bias)

    def check(self, x: Any, axes: Any, scale: Any, bias: Any) -> str | None:
        return last.problem_of_casts(x, self.half) or last.problem(x, axes, scale, bias)

    replace = LayerNormAffine.replace


class LayerNormWidenedAffine(_Widened):
    """Cast((Cast(x) − mean) / √(variance + ε) · scale + bias), the affine part in float32 too."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar, scale: Weight, bias: Weight) -> Any:
        return op.Cast(op.Add(op.Mul(self.widened(op, x, axes, epsilon), scale), bias), to=self.half)

    def check(self, x: Any, axes: Any, scale: Any, bias: Any) -> str | None:
        problem = last.problem_of_casts(x, self.half) or last.problem(x, axes, scale, bias)
        return problem or last.problem_of_narrowing(self.half, scale, bias)

    def replace(self, op: Any, x: Any, axes: Any, epsilon: Any, scale: Any, bias: Any) -> Any:
        scale, bias = (last.affine(tensor, x, axes, self.half) for tensor in (scale, bias))
        return op.LayerNormalization(x, scale, bias, axis=-len(axes), epsilon=epsilon)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        values = super().example(rng)
        # Quarters are exact in every floating type.
        return values | {n: rng.integers(-8, 9, values[n]).astype(np.float32) / 4 for n in ("scale", "bias")}


class LayerNormWidenedPlain(_Widened):
    """Cast((Cast(x) − mean) / √(variance + ε))."""

    def pattern(self, op: Any, x: Any, axes: Attribute, epsilon: Scalar) -> Any:
        return op.Cast(self.widened(op, x, axes, epsilon), to=self.half)

    def check(self, x: Any, axes: Any) -> str | None:
        return last.problem_of_casts(x, self.half) or last.problem(x, axes)

    replace = LayerNormPlain.replace


class LayerNormFlattened(_LayerNorm):
    """The operator's own definition: x flattened to a matrix whose rows are normalised, and put back in shape."""

    symbolic = False

    def pattern(
        self, op: Any, x: Any, axis: Attribute, epsilon: Scalar, scale: Weight, bias: Weight, shape: Weight
    ) -> Any:
        rows = op.Flatten(x, axis=axis)
        mean = op.ReduceMean(rows, axes=[1])
        variance = op.Sub(op.ReduceMean(op.Mul(rows, rows), axes=[1]), op.Mul(mean, mean))
        deviation = op.Sqrt(op.Add(variance, epsilon))
        centred = op.Sub(rows, mean)
        normalised = op.either(op.Div(centred, deviation), op.Mul(centred, op.Reciprocal(deviation)))
        return op.Reshape(op.Add(op.Mul(normalised, scale), bias), shape)

    def check(self, x: Any, axis: Any, scale: Any, bias: Any, shape: Any) -> str | None:
        sizes = last.static_sizes(x)
        if sizes is None:
            return f"the shape of '{x.name}' is not static"
        if values_of(shape).tolist() != sizes:
            return f"the result is put in shape {values_of(shape).tolist()}, '{x.name}' has {sizes}"
        axes = _from(axis, len(sizes))
        if not axes:
            return f"nothing is left of '{x.name}' from axis {axis} on"
        flat = (1, prod(sizes[axes[0] :]))
        wrong = next((t for t in (scale, bias) if shape_of(t) not in (flat, flat[1:])), None)
        if wrong is not None:
            return f"'{wrong.name}' has shape {list(wrong.shape)}, {list(flat)} is needed"
        return last.problem(x, axes)

    def replace(self, op: Any, x: Any, axis: Any, epsilon: Any, scale: Any, bias: Any) -> Any:
        axes = _from(axis, len(x.shape))
        scale, bias = (values_of(tensor).reshape(x.shape[axes[0] :]) for tensor in (scale, bias))
        return op.LayerNormalization(x, scale, bias, axis=-len(axes), epsilon=epsilon)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        shape = tuple(int(n) for n in rng.integers(3, 6, 3))
        flat = (1, prod(shape[1:]))
        values = {"x": shape, "axis": 1, "epsilon": 1e-5, "scale": flat, "bias": flat}
        return values | {"shape": np.array(shape, np.int64)}


def _from(axis: int, rank: int) -> list[int]:
    """The axes from `axis` on."""
    return list(range(axis % rank if axis < 0 else axis, rank))


class FuseLayerNorm(RewritePass):
    """Fuses layer normalisation, spelled out with ReduceMean, to one LayerNormalization node.

    x [..., n₁ … nₖ], float16, bfloat16 or float32; scale and bias constants [n₁ … nₖ]:
    `Add(Mul(Div(Sub(x, m), Sqrt(Add(ReduceMean(Pow(Sub(x, m), 2)), ε))), scale), bias)` with m = ReduceMean(x) over
    the last k axes → `LayerNormalization(x, scale, bias, axis=-k)`; also without bias, and without both; with the
    variance as mean(x²) − m²; with Pow(…, 0.5) or Reciprocal; as Keras writes it; as ONNX's own function of the
    operator. Casts of a 16-bit x to float32 and back around it go too, where scale and bias lose nothing by it.
    The fused node computes mean and variance in float32 whatever x is, which cures the FP16 overflow of the square.
    float64 stays as it is: the operator would compute it in float32.

    **Safety:** tolerance; the same function, rounded fewer times (float32: 1e-5 of the largest value).

    Source: ONNX operator LayerNormalization-17; Ba, Kiros and Hinton, Layer Normalization, 2016.
    """

    after: ClassVar = ("fold-constants",)
    safety: ClassVar = "tolerance"
    rules: ClassVar = (
        *(rule(half) for half in last.HALVES for rule in (LayerNormWidened, LayerNormWidenedAffine)),
        *(LayerNormWidenedPlain(half) for half in last.HALVES),
        LayerNormFlattened(),
        LayerNormBatchStyle(),
        LayerNormPooled(),
        LayerNormAffine(),
        LayerNormScale(),
        LayerNormPlain(),
    )
