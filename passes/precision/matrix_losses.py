"""What matrix products lose by quantization, worked out from the rows of their activations, many samples at a time.

A weight is read and quantized once for many rows, a part of its channels at a time: no copy of a whole one is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmc.passes.graph import Array, Constant, load_values
from llmc.passes.graph.in_parts import on_every_core, slices
from llmc.passes.precision.insert_qdq import channel_scales
from llmc.passes.precision.levels import Levels
from llmc.passes.precision.products import WHOLE, Product

PART = 1 << 22
"""Values of a weight, or of results, that are looked at together on a core."""
ROWS = 512
"""Rows of an activation from which its weights are worth reading."""


@dataclass(frozen=True)
class Sums:
    """Over some rows of a product: of the squares of its float results, and of what quantization moves them by."""

    values: int
    signal: float
    noise: float
    total: Array
    """What it lacks, for each channel: float64 [channels]."""


class MatrixProduct:
    """A MatMul or Gemm of rows [n, depth] with a constant matrix, in float and quantized."""

    def __init__(self, product: Product, levels: Levels, amax: Mapping[str, float]) -> None:
        self.product, self.levels = product, levels
        (self.activation,) = product.names
        self.step = levels.scales(np.asarray(amax[self.activation]), product.dtype)
        self.scales = channel_scales(product, levels)
        self.bias = _bias(product)

    def sums(self, rows: Array) -> Sums:
        """Of these rows. Values of 16 bits round where an operator hands them on; sums are of float32."""
        read = self.product.read
        if read is None:
            raise TypeError(f"{self.product.node.name} multiplies two activations")
        matrix = read(WHOLE)
        matrix = matrix if self.product.axis == 1 else matrix.T
        exact = rows.astype(np.float32)
        coarse = self._rounded(self.levels.saturate(exact, self.step).astype(np.float32) * np.float32(self.step))

        def part(channels: slice) -> tuple[float, float, Array]:
            weight, scale = matrix[:, channels].astype(np.float32), self.scales[channels].astype(np.float32)
            levels = self.levels.quantize(weight, scale).astype(np.float32)
            bias = 0 if self.bias is None else self.bias[channels].astype(np.float32)
            signal = noise = 0.0
            total = np.zeros(weight.shape[1])
            levels *= scale
            rounded = self._rounded(levels)
            for some in slices(len(rows), PART // weight.shape[1]):
                result = self._rounded(exact[some] @ weight + bias)
                off = np.subtract(result, self._rounded(coarse[some] @ rounded + bias), dtype=np.float64)
                signal += _square(result)
                noise += _square(off)
                total += off.sum(axis=0)
            return signal, noise, total

        parts = on_every_core(part, slices(matrix.shape[1], PART // matrix.shape[0]))
        signals, noises, totals = zip(*parts, strict=True)
        return Sums(len(rows) * matrix.shape[1], sum(signals), sum(noises), np.concatenate(totals))

    def _rounded(self, values: Array) -> Array:
        """float32 as the type of the product holds it."""
        if self.product.dtype == np.float32:
            return values
        with np.errstate(over="ignore"):
            return values.astype(self.product.dtype).astype(np.float32)


def is_matrix_product(product: Product) -> bool:
    """Whether a product is what `MatrixProduct` works out."""
    node = product.node
    if node.op not in ("MatMul", "Gemm") or product.weight is None or product.position != 1:
        return False
    if len(product.weight.shape or ()) != 2:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    plain = bias is None or (isinstance(bias, Constant) and len(bias.shape) == 1)
    factors = (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0))
    return node.op == "MatMul" or (plain and not node.attrs.get("transA") and factors == (1.0, 1.0))


def _bias(product: Product) -> Array | None:
    given = product.node.inputs[2] if len(product.node.inputs) > 2 else None
    return load_values(given) if isinstance(given, Constant) else None


def _square(values: Array) -> float:
    """The sum of squares, in float64."""
    flat = values.astype(np.float64, copy=False).ravel()
    return float(flat @ flat)
