"""The pass `fuse-batch-norm`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from llmc.passes.fuse.channel_weights import Product, values_of
from llmc.passes.graph import Array, Tensor, shape_of
from llmc.passes.rewrite import Attribute, Attributes, Rewrite, RewritePass, Weight


class _BatchNorm(Rewrite):
    """What the rules share: BatchNormalization, its statistics as one factor and one offset for each channel."""

    op: ClassVar[str]
    opset = 9

    def problem(self, product: Product, statistics: Sequence[Tensor], epsilon: float) -> str | None:
        if not all(shape_of(t) == (product.channels,) for t in statistics):
            return f"the statistics are not one number for each of the {product.channels} channels"
        return product.problem(*_factor_and_offset(*statistics, epsilon=epsilon))

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        channels = int(rng.integers(1, 4)) * 2
        statistics: dict[str, Any] = dict.fromkeys(("scale", "shift", "mean"), (channels,))
        # Variances are positive; away from zero, so that the factors stay of order 1.
        variance = rng.uniform(0.5, 2.0, channels)
        return self.shapes(channels) | statistics | {"variance": variance, "epsilon": 1e-5, "momentum": 0.9}

    @abstractmethod
    def shapes(self, channels: int) -> dict[str, Any]:
        """Shapes of x, weight and bias, and attributes, that make `channels` output channels."""


def _factor_and_offset(
    scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, *, epsilon: float
) -> tuple[Array, Array]:
    """float64 [channels] each, such that BatchNormalization(y) = y · factor + offset; NaN where it is not defined."""
    wide = [values_of(t).astype(np.float64) for t in (scale, shift, mean, variance)]
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = wide[0] / np.sqrt(wide[3] + epsilon)
    return factor, wide[1] - wide[2] * factor


class BatchNormConv(_BatchNorm):
    """BatchNormalization(Conv(x)), grouped or not."""

    op = "Conv"

    def pattern(
        self, op: Any, x: Any, weight: Weight, bias: Weight, scale: Weight, shift: Weight, mean: Weight,
        variance: Weight, epsilon: Attribute, momentum: Attribute, attributes: Attributes,
    ) -> Any:  # fmt: skip
        product = getattr(op, self.op)(x, weight, op.optional(bias), others=attributes)
        return op.BatchNormalization(product, scale, shift, mean, variance, epsilon=epsilon, momentum=momentum)

    def check(
        self, weight: Any, bias: Any, scale: Any, shift: Any, mean: Any, variance: Any, epsilon: Any, attributes: Any
    ) -> str | None:
        return self.problem(Product(self.op, weight, bias, attributes), (scale, shift, mean, variance), epsilon)

    def replace(
        self, op: Any, x: Any, weight: Any, bias: Any, scale: Any, shift: Any, mean: Any, variance: Any, epsilon: Any,
        attributes: Any,
    ) -> Any:  # fmt: skip
        product = Product(self.op, weight, bias, attributes)
        factor, offset = _factor_and_offset(scale, shift, mean, variance, epsilon=epsilon)
        applied = {**attributes, "beta": 1.0} if self.op == "Gemm" else attributes
        return getattr(op, self.op)(x, product.scaled(factor), product.shifted(factor, offset), others=applied)

    def shapes(self, channels: int) -> dict[str, Any]:
        attributes = {"group": 2, "pads": [1, 1, 1, 1], "strides": [2, 1]}
        return {"x": (2, 4, 5, 5), "weight": (channels, 2, 3, 3), "bias": (channels,), "attributes": attributes}


class BatchNormConvTranspose(BatchNormConv):
    """BatchNormalization(ConvTranspose(x)), grouped or not."""

    op = "ConvTranspose"

    def shapes(self, channels: int) -> dict[str, Any]:
        attributes = {"group": 2, "strides": [2, 1]}
        return {"x": (2, 4, 3, 3), "weight": (4, channels // 2, 2, 2), "bias": (channels,), "attributes": attributes}


class BatchNormGemm(BatchNormConv):
    """BatchNormalization(Gemm(x))."""

    op = "Gemm"

    def shapes(self, channels: int) -> dict[str, Any]:
        attributes = {"transB": 1, "alpha": 0.5, "beta": 2.0}
        return {"x": (3, 5), "weight": (channels, 5), "bias": (channels,), "attributes": attributes}


class BatchNormMatMul(_BatchNorm):
    """BatchNormalization of a MatMul of two matrices, which becomes a Gemm."""

    op = "MatMul"

    def pattern(
        self, op: Any, x: Any, weight: Weight, scale: Weight, shift: Weight, mean: Weight, variance: Weight,
        epsilon: Attribute, momentum: Attribute,
    ) -> Any:  # fmt: skip
        product = op.MatMul(x, weight)
        return op.BatchNormalization(product, scale, shift, mean, variance, epsilon=epsilon, momentum=momentum)

    def check(self, x: Any, weight: Any, scale: Any, shift: Any, mean: Any, variance: Any, epsilon: Any) -> str | None:
        if not len(weight.shape) == len(x.shape or ()) == 2:
            return f"'{x.name}' and '{weight.name}' are not both matrices"
        return self.problem(Product(self.op, weight), (scale, shift, mean, variance), epsilon)

    def replace(
        self, op: Any, x: Any, weight: Any, scale: Any, shift: Any, mean: Any, variance: Any, epsilon: Any
    ) -> Any:
        product = Product(self.op, weight)
        factor, offset = _factor_and_offset(scale, shift, mean, variance, epsilon=epsilon)
        return op.Gemm(x, product.scaled(factor), product.shifted(factor, offset))

    def shapes(self, channels: int) -> dict[str, Any]:
        return {"x": (3, 5), "weight": (5, channels)}


class FuseBatchNorm(RewritePass):
    """Takes BatchNormalization at inference into the weights of the Conv, ConvTranspose, Gemm or MatMul before it.

    x [N, C, …], weights, bias and statistics constants, one number for each output channel:
    `BatchNormalization(Conv(x, W, b), s, t, mean, var)` → `Conv(x, W · k, b · k + t − mean · k)` with
    k = s / √(var + ε), computed in float64 and rounded to the type of W; grouped convolutions too. A MatMul becomes a
    Gemm. Left alone where something else reads the Conv's result, and where float16 weights would overflow.

    **Safety:** tolerance; every weight is rounded once more (float32: 1e-6 of the largest value, float16: 1e-3).

    Source: ONNX operator BatchNormalization-15; Jacob et al., Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference, 2018, section 3.2.
    """

    after: ClassVar = ("fold-constants",)
    safety: ClassVar = "tolerance"
    rules: ClassVar = (BatchNormConv(), BatchNormConvTranspose(), BatchNormGemm(), BatchNormMatMul())
