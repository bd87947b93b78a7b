"""Number formats of few bits that share a scale by the block: NVFP4 and MXFP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from llmc.passes.graph import Array, numpy_dtype
from llmc.passes.graph.in_parts import on_every_core
from llmc.passes.precision.rounding.parts import Part, grids_of, parts_of, square

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST_E4M3 = 448.0
SMALLEST_E4M3 = 2.0**-9
"""The least E4M3 number above 0."""
SMALLEST_TENSOR_SCALE = 2.0**-15
"""With it the least block scale, 2^-24, is still a float16 number."""
SPANS = np.linspace(4.0, 8.0, 9)
"""Numbers of E2M1's, of which the largest is 6, that a search lets the largest value of a block stand at."""


@dataclass(frozen=True)
class BlockFormat:
    """Elements of one type, and a scale for each `block` of them along the axis that a product sums over."""

    name: str
    """In the names of tensors."""
    dtype: int
    """Of the elements, as ONNX numbers it."""
    scale_dtype: int
    """Of the scales."""
    largest: float
    half_step: float
    """Half the distance to the number that would come after the largest."""
    block: int
    since: int
    """The opset from which QuantizeLinear and DequantizeLinear have it."""

    @property
    def numpy(self) -> np.dtype[Any]:
        return numpy_dtype(self.dtype)

    @property
    def numpy_scale(self) -> np.dtype[Any]:
        return numpy_dtype(self.scale_dtype)

    @property
    def two_levels(self) -> bool:
        """Whether the scales of blocks are themselves in steps of a scale of the whole tensor."""
        return self.scale_dtype == onnx.TensorProto.FLOAT8E4M3FN

    def elements(self, blocks: Array, scale: Array) -> Array:
        """The elements nearest to `blocks` [rows, n, block] / `scale` [rows, n]; ties to even, at most the largest."""
        exact = blocks.astype(np.float32, copy=False) / scale.astype(np.float32)[..., None]
        nearest: Array = np.clip(exact, -self.largest, self.largest).astype(self.numpy)
        return nearest

    def round(self, matrix: Array, reach: float | None = None) -> BlockRounded:
        """`matrix` [rows, depth] in this format; depth is a multiple of the block.

        `reach` is the largest magnitude of the tensor, where the matrix is a part of it.
        """
        blocks = matrix.astype(np.float32, copy=False).reshape(len(matrix), -1, self.block)
        amax = np.abs(blocks).max(axis=-1)
        if not self.two_levels:
            stored = power_of_two(amax / self.largest).astype(self.numpy_scale)
            return BlockRounded(self, self.elements(blocks, stored), stored, 1.0)
        whole = tensor_scale(float(amax.max(initial=0)) if reach is None else reach, SPANS[0])
        best, least = np.zeros(amax.shape, E4M3), np.full(amax.shape, np.inf, np.float32)
        for span in SPANS:
            stored = np.clip(amax / np.float32(span * whole), SMALLEST_E4M3, LARGEST_E4M3).astype(E4M3)
            scale = stored.astype(np.float32) * np.float32(whole)
            moved = self.elements(blocks, scale).astype(np.float32) * scale[..., None] - blocks
            error = np.square(moved).sum(axis=-1)
            best, least = np.where(error < least, stored, best), np.minimum(error, least)
        return BlockRounded(self, self.elements(blocks, best.astype(np.float32) * np.float32(whole)), best, whole)


@dataclass(frozen=True)
class BlockRounded:
    """A matrix in a block format: elements [rows, blocks, block], scales [rows, blocks], and the tensor's scale."""

    format: BlockFormat
    elements: Array
    stored: Array
    whole: float

    @property
    def scale(self) -> Array:
        """Of each block: float32 [rows, blocks], exact."""
        return self.stored.astype(np.float32) * np.float32(self.whole)

    def matrix(self) -> Array:
        """What it stands for: float32 [rows, depth], exact."""
        return (self.elements.astype(np.float32) * self.scale[..., None]).reshape(len(self.elements), -1)

    def clipped(self, matrix: Array) -> float:
        """Share of the values [rows, depth] that it was made of that a number after the largest would be nearer to."""
        exact = np.abs(matrix.reshape(self.elements.shape)) / self.scale[..., None]
        beyond = np.count_nonzero(exact > self.format.largest + self.format.half_step)
        return beyond / max(exact.size, 1)


@dataclass(frozen=True)
class WeightInBlocks:
    """A weight in a block format, laid out as it was."""

    elements: Array
    """Of the weight's shape."""
    stored: Array
    """Scales of blocks: of its shape with blocks in the place of values along the axis that is summed."""
    whole: float
    """The scale of the tensor."""
    clipped: float
    """Share of the values that a number after the largest would be nearer to."""
    moved: float
    """L2 norm of what rounding moved, over that of the weight; 0 for a weight of zeros."""

    @property
    def scale(self) -> Array:
        """Of each block: float32, exact."""
        return self.stored.astype(np.float32) * np.float32(self.whole)


def round_weight(weight: Array, axis: int, form: BlockFormat) -> WeightInBlocks:
    """A weight in a format, part by part; blocks run along `axis`, from 0. Raises NotFiniteError."""
    parts = parts_of(weight.shape, axis, form.block)
    reach = max(on_every_core(lambda part: float(np.abs(part.rows(weight)).max(initial=0)), parts), default=0.0)
    elements = np.empty(weight.shape, form.numpy)
    stored = np.empty(grids_of(weight.shape, axis, form.block), form.numpy_scale)

    def work(part: Part) -> tuple[float, Array]:
        rows = part.rows(weight)
        rounded = form.round(rows, reach)
        part.put(rounded.elements.reshape(rows.shape), elements)
        part.put_grids(rounded.stored, stored)
        sums = (rounded.clipped(rows) * rows.size, square(rounded.matrix() - rows), square(rows))
        return rounded.whole, np.array(sums, np.float64)

    wholes, sums = zip(*on_every_core(work, parts), strict=True)
    beyond, moved, whole = map(float, np.sum(sums, axis=0))
    return WeightInBlocks(
        elements, stored, wholes[0], beyond / max(weight.size, 1), (moved / whole) ** 0.5 if whole else 0.0
    )


NVFP4 = BlockFormat(
    name="nvfp4",
    dtype=onnx.TensorProto.FLOAT4E2M1,
    scale_dtype=onnx.TensorProto.FLOAT8E4M3FN,
    largest=6.0,
    half_step=1.0,
    block=16,
    since=23,
)
MXFP8 = BlockFormat(
    name="mxfp8",
    dtype=onnx.TensorProto.FLOAT8E4M3FN,
    scale_dtype=onnx.TensorProto.FLOAT8E8M0,
    largest=448.0,
    half_step=16.0,
    block=32,
    since=24,
)


def tensor_scale(amax: float, span: float = 6.0) -> float:
    """NVFP4's scale of a whole tensor: the power of two in steps of which E4M3 reaches amax / span.

    E4M3 is as exact near 0 as far from it, so nothing is lost by a power of two, and something is gained: block
    scales, of four significant bits, and elements times them, of six, are exact in float16 and bfloat16.
    """
    return max(float(power_of_two(np.asarray(amax / (span * LARGEST_E4M3)))), SMALLEST_TENSOR_SCALE)


def power_of_two(values: Array) -> Array:
    """The least powers of two, of those that E8M0 has, that are no less than `values`; 1 where the value is 0."""
    exponents = np.ceil(np.log2(np.where(values > 0, values, 1).astype(np.float64)))
    found: Array = np.exp2(np.clip(exponents, -127, 127))
    return found
