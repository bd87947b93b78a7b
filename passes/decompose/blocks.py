"""Weights quantized in blocks: MatMulNBits and GatherBlockQuantized of com.microsoft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from llmc.passes.decompose.families import Family, Made, Site, StaysError
from llmc.passes.graph import Array, Constant, Derived, constant_source, load_values

BLOCKS = Family()
BITS = (2, 4, 8)


@BLOCKS.decomposes("MatMulNBits", opset=21)
def matmul_n_bits(site: Site) -> Made:
    """A · DQ(W) + bias, with W [K, N] in blocks along K, its zero points taken off beforehand: int4 where that fits.

    ONNX Runtime may round A to int8 (`accuracy_level` 4); this does not.
    """
    op, bits, block = site.op, site.attribute("bits", 4), site.attribute("block_size")
    rows, depth = site.attribute("N"), site.attribute("K")
    site.refuse_attributes(weight_prepacked=0)
    if site.input(4) is not None:
        raise StaysError("it has a group index")
    if bits not in BITS:
        raise StaysError(f"its weights have {bits} bits; this pass takes {', '.join(map(str, BITS))}")
    packed, scales = _constant(site, 1), _constant(site, 2)
    blocks = -(-depth // block)
    zero = _zero_points(site, 3, rows, blocks, bits)

    def levels() -> Array:
        """[K, N], zero points taken off."""
        values = unpack(load_values(packed).reshape(rows, -1), bits).reshape(rows, blocks, block)
        centred = values.astype(np.int16) - zero[:, :, None]
        made: Array = np.ascontiguousarray(centred.reshape(rows, -1)[:, :depth].T)
        return made

    weight = op.constant(_narrowest(levels, (depth, rows)))
    scale = op.constant(np.ascontiguousarray(load_values(scales).reshape(rows, blocks).T))
    dequantized = op.DequantizeLinear(weight, scale, axis=0, block_size=block)
    product, bias = op.MatMul(site.needed(0), dequantized), site.input(5)
    return product if bias is None else op.Add(product, bias)


@BLOCKS.decomposes("GatherBlockQuantized", opset=21)
def gather_block_quantized(site: Site) -> Made:
    """Gather from DQ(data), in blocks, its zero points taken off beforehand."""
    op, block, bits = site.op, site.attribute("block_size", 128), site.attribute("bits", 4)
    data, scales = _constant(site, 0), _constant(site, 2)
    axis = site.attribute("quantize_axis", 1) % len(data.shape)
    if data.dtype.kind not in "iu" and data.dtype not in (ml_dtypes.int4, ml_dtypes.uint4):
        raise StaysError(f"its data is {data.dtype}")
    if axis != len(data.shape) - 1:
        raise StaysError("its blocks do not run along the last axis")
    is_packed = data.dtype == np.uint8
    shape = (*data.shape[:-1], data.shape[-1] * (8 // bits if is_packed else 1))
    zero = _table_zero_points(site, data, bits, tuple(scales.shape))

    def levels() -> Array:
        values = load_values(data)
        if is_packed:
            values = unpack(values.reshape(-1, values.shape[-1]), bits).reshape(shape)
        centred: Array = values.astype(np.int16) - np.repeat(zero, block, axis=-1)[..., : shape[-1]]
        return centred

    table = op.DequantizeLinear(op.constant(_narrowest(levels, shape)), site.needed(2), axis=axis, block_size=block)
    return op.Gather(table, site.needed(1), axis=site.attribute("gather_axis", 0))


def unpack(packed: Array, bits: int) -> Array:
    """uint8 [rows, n] → the values of `bits` bits in it [rows, n · 8 / bits], low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _constant(site: Site, index: int) -> Constant:
    tensor = site.needed(index)
    found = constant_source(tensor)
    if found is None or found is not tensor:
        raise StaysError(f"'{tensor.name}' is not a constant")
    return found


def _zero_points(site: Site, index: int, rows: int, blocks: int, bits: int) -> Array:
    """int16 [rows, blocks]."""
    if site.input(index) is None:
        return np.full((rows, blocks), 1 << (bits - 1), np.int16)
    values = load_values(_constant(site, index))
    if values.dtype == np.uint8:
        return unpack(values.reshape(rows, -1), bits)[:, :blocks].astype(np.int16)
    whole = values.astype(np.float64)
    if not np.array_equal(whole, np.rint(whole)):
        raise StaysError("its zero points are no integers")
    return whole.astype(np.int16).reshape(rows, blocks)


def _table_zero_points(site: Site, data: Constant, bits: int, shape: tuple[int, ...]) -> Array:
    if site.input(3) is None:
        return np.full(shape, 1 << (bits - 1) if data.dtype == np.uint8 else 0, np.int16)
    values = load_values(_constant(site, 3))
    if data.dtype == np.uint8:
        values = unpack(values.reshape(-1, values.shape[-1]), bits)[:, : shape[-1]]
    return values.astype(np.int16).reshape(shape)


def _narrowest(levels: Callable[[], Array], shape: tuple[int, ...]) -> Derived:
    """The levels as int4 where all of them fit, else as int8; read when they are needed."""
    values = levels()
    low, high = int(values.min()), int(values.max())
    if low < -128 or high > 127:
        raise StaysError(f"less their zero points its weights run from {low} to {high}, beyond int8")
    fits = low >= -8 and high <= 7
    dtype: Any = ml_dtypes.int4 if fits else np.int8
    return Derived(onnx.TensorProto.INT4 if fits else onnx.TensorProto.INT8, shape, lambda: levels().astype(dtype))
