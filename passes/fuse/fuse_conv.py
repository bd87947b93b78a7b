"""The pass `fuse-conv`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from llmc.passes.fuse.channel_weights import Product
from llmc.passes.graph import Array
from llmc.passes.rewrite import Attribute, Attributes, Rewrite, RewritePass, Scalar, Weight


class _Channelwise(Rewrite):
    """What the rules share: a Conv or ConvTranspose, and a constant that its result meets."""

    op: ClassVar[str] = "Conv"
    opset = 7

    def convolution(self, op: Any, x: Any, weight: Any, bias: Any, attributes: Any) -> Any:
        return getattr(op, self.op)(x, weight, op.optional(bias), others=attributes)

    @abstractmethod
    def factor_and_offset(self, product: Product, constant: Any) -> tuple[Array | None, Array | None]:
        """float64 [channels] each; None for a constant that is not one number a channel."""

    def check(self, x: Any, weight: Any, bias: Any, constant: Any, attributes: Any) -> str | None:  # noqa: ARG002
        product = Product(self.op, weight, bias, attributes)
        return product.problem(*self.factor_and_offset(product, constant))

    def replace(self, op: Any, x: Any, weight: Any, bias: Any, constant: Any, attributes: Any) -> Any:
        product = Product(self.op, weight, bias, attributes)
        factor, offset = self.factor_and_offset(product, constant)
        assert factor is not None
        assert offset is not None
        with_bias = bias is not None or offset.any()
        shifted = product.shifted(factor, offset) if with_bias else None
        return getattr(op, self.op)(x, product.scaled(factor), shifted, others=attributes)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        channels = int(rng.integers(1, 4)) * 2
        constant = [(channels, 1, 1), (1, channels, 1, 1), (1,)][int(rng.integers(3))]
        weight = (channels, 2, 3, 3) if self.op == "Conv" else (4, channels // 2, 2, 2)
        attributes = {"group": 2, "strides": [2, 1]}
        return {
            "x": (2, 4, 5, 5), "weight": weight, "bias": (channels,), "constant": constant, "attributes": attributes,
        }  # fmt: skip


class ConvMul(_Channelwise):
    """Conv(x) · k."""

    def pattern(self, op: Any, x: Any, weight: Weight, bias: Weight, constant: Weight, attributes: Attributes) -> Any:
        return op.Mul(self.convolution(op, x, weight, bias, attributes), constant)

    def factor_and_offset(self, product: Product, constant: Any) -> tuple[Array | None, Array | None]:
        return product.along_channels(constant), np.zeros(product.channels)


class ConvAdd(_Channelwise):
    """Conv(x) + k."""

    def pattern(self, op: Any, x: Any, weight: Weight, bias: Weight, constant: Weight, attributes: Attributes) -> Any:
        return op.Add(self.convolution(op, x, weight, bias, attributes), constant)

    def factor_and_offset(self, product: Product, constant: Any) -> tuple[Array | None, Array | None]:
        return np.ones(product.channels), product.along_channels(constant)


class ConvTransposeMul(ConvMul):
    """ConvTranspose(x) · k."""

    op = "ConvTranspose"


class ConvTransposeAdd(ConvAdd):
    """ConvTranspose(x) + k."""

    op = "ConvTranspose"


class PadConv(Rewrite):
    """Conv(Pad(x)), zeros around the spatial axes."""

    opset = 7

    def pattern(
        self,
        op: Any,
        x: Any,
        filled: Scalar,
        weight: Any,
        pads: Attribute,
        auto_pad: Attribute,
        conv_pads: Attribute,
        bias: Any,
        attributes: Attributes,
    ) -> Any:
        padded = op.Pad(x, op.optional(filled), pads=pads)
        return op.Conv(padded, weight, op.optional(bias), auto_pad=auto_pad, pads=conv_pads, others=attributes)

    def check(self, filled: Any, pads: Any, auto_pad: Any) -> str | None:
        if filled:
            return f"the padding is {filled:.6g}, Conv pads with 0"
        if auto_pad not in (None, "NOTSET", "VALID"):
            return f"Conv has auto_pad {auto_pad}"
        if not isinstance(pads, list) or len(pads) < 6:
            return "the padding is not of a tensor with spatial axes"
        rank = len(pads) // 2
        if any(pads[i] for i in (0, 1, rank, rank + 1)):
            return f"the padding {pads} is not of spatial axes only"
        return f"the padding {pads} cuts off" if min(pads) < 0 else None

    def replace(
        self, op: Any, x: Any, weight: Any, pads: Any, auto_pad: Any, conv_pads: Any, bias: Any, attributes: Any
    ) -> Any:
        rank = len(pads) // 2
        spatial = [*pads[2:rank], *pads[rank + 2 :]]
        own = conv_pads if conv_pads and auto_pad != "VALID" else [0] * len(spatial)
        total = [outer + inner for outer, inner in zip(spatial, own, strict=True)]
        return op.Conv(x, weight, bias, pads=total, others=attributes)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        around = [int(n) for n in rng.integers(0, 3, 4)]
        return {
            "x": (2, 3, 5, 5), "filled": 0.0, "weight": (4, 3, 2, 2), "bias": (4,), "auto_pad": "NOTSET",
            "pads": [0, 0, *around[:2], 0, 0, *around[2:]], "conv_pads": [1, 0, 0, 1], "attributes": {},
        }  # fmt: skip


class FuseConv(RewritePass):
    """Takes what stands around a convolution into it: a factor or offset for each channel, and zero padding.

    x [N, C, …], weights and bias constants, k constant with one number for each output channel, or one for all:
    `Mul(Conv(x, W, b), k)` → `Conv(x, W · k, b · k)`; `Add(Conv(x, W, b), k)` → `Conv(x, W, b + k)`; both for
    ConvTranspose too, and grouped. `Conv(Pad(x))` with zeros around spatial axes → `Conv(x)` with larger `pads`.
    Left alone where something else reads what stands between, and where float16 weights would overflow.

    **Safety:** tolerance; every weight is rounded once more (float32: 1e-6 of the largest value, float16: 1e-3);
    exact for padding.

    Source: ONNX operators Conv-22, ConvTranspose-22, Pad-25.
    """

    after: ClassVar = ("fold-constants", "fuse-batch-norm")
    safety: ClassVar = "tolerance"
    repeat: ClassVar = True
    rules: ClassVar = (PadConv(), ConvMul(), ConvAdd(), ConvTransposeMul(), ConvTransposeAdd())
