"""Integer products without scales, and quantization that measures its input in each run."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from llmc.passes.decompose.families import Family, Made, Site, StaysError
from llmc.passes.decompose.quantized import column_axis, dequantize
from llmc.passes.graph import Node, Tensor

INTEGERS = Family()
EXACT = 1 << 24
"""float32 holds every integer up to here."""
FLOATS = {1, 10, 11, 16}


@INTEGERS.decomposes("DynamicQuantizeLinear", domain="")
def dynamic_quantize_linear(site: Site) -> Made:
    """Levels by floating-point operators, as ONNX defines them; uint8 only at the end, where an integer is asked for.

    TensorRT takes neither QuantizeLinear with a computed scale, nor uint8.
    """
    levels, scale, zero_point = _measured(site)
    return site.op.Cast(levels, to=2), scale, site.op.Cast(zero_point, to=2)


def _measured(site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Levels 0 … 255 of the node's first input, their scale and zero point, all float32."""
    op, x = site.op, site.needed(0)
    zero, top = np.float32(0), np.float32(255)
    high, low = op.Max(op.ReduceMax(x, keepdims=0), zero), op.Min(op.ReduceMin(x, keepdims=0), zero)
    width = op.Sub(high, low)
    scale = op.Where(op.Equal(width, zero), np.array(1, np.float32), op.Div(width, top))
    zero_point = op.Round(op.Clip(op.Sub(zero, op.Div(low, scale)), zero, top))
    return op.Clip(op.Add(op.Round(op.Div(x, scale)), zero_point), zero, top), scale, zero_point


@INTEGERS.decomposes("MatMulInteger", domain="")
def matmul_integer(site: Site) -> Made:
    """(A − zero) · (B − zero) in float32."""
    a, b = site.needed(0), site.needed(1)
    if site.input(2) is not None and site.rank(site.needed(2)) > 0 and site.shape(site.needed(2)) != [1]:
        raise StaysError("it has a zero point for each row")
    product = site.op.MatMul(
        _levels(site, a, site.input(2), None), _levels(site, b, site.input(3), column_axis(site, b))
    )
    return _integer(site, product, site.shape(b)[-2:-1], (a, b))


@INTEGERS.decomposes("ConvInteger", domain="")
def conv_integer(site: Site) -> Made:
    """Conv(X − zero, W − zero) in float32."""
    x, w = site.needed(0), site.needed(1)
    product = site.op.Conv(_levels(site, x, site.input(2), None), _levels(site, w, site.input(3), 0), **site.node.attrs)
    return _integer(site, product, site.shape(w)[1:], (x, w))


def _levels(site: Site, x: Tensor, zero: Tensor | None, axis: int | None) -> Tensor:
    """x − zero as float32; where the levels were made in float32, these."""
    made, made_zero = _source(x), _source(zero)
    if made is not None and made_zero is not None:
        return site.op.Sub(made, made_zero)
    shape = site.shape(zero) if zero is not None else []
    one = site.op.constant(np.ones(() if shape in ([], [1]) else shape, np.float32))
    return dequantize(site, x, one, zero, axis)


def _source(tensor: Tensor | None) -> Tensor | None:
    """The float32 levels that a Cast to uint8 of this pass was made from."""
    if tensor is None or not tensor.inputs:
        return None
    cast: Node = tensor.inputs[0]
    if cast.op != "Cast" or not cast.inputs[0].inputs:
        return None
    maker: Node = cast.inputs[0].inputs[0]
    return cast.inputs[0] if maker.op in ("Clip", "Round") and cast.attrs.get("to") == 2 else None


def _integer(site: Site, product: Tensor, summed: list[Any], factors: tuple[Tensor, Tensor]) -> Tensor:
    """int32 of an exact product, which it is up to 2^24; or as it is, where it is cast to floating point anyway."""
    output = site.node.outputs[0]
    readers = output.outputs
    if readers and not site.is_output(0) and all(n.op == "Cast" and n.attrs["to"] in FLOATS for n in readers):
        return product
    sizes = [n if isinstance(n, int) else None for n in summed]
    if None in sizes:
        raise StaysError("how many products it adds is not known: float32 may not hold their sum")
    bound = prod(n for n in sizes if n is not None) * prod(_widest(site, t) for t in factors)
    if bound > EXACT:
        raise StaysError(f"its sums may reach {bound}, float32 is exact to {EXACT}, and they are used as integers")
    return site.op.Cast(product, to=6)


def _widest(site: Site, tensor: Tensor) -> int:
    """The largest magnitude of a level less its zero point."""
    info = np.iinfo(site.dtype(tensor))
    return int(info.max) - int(info.min)


@INTEGERS.decomposes("DynamicQuantizeMatMul")
def dynamic_quantize_matmul(site: Site) -> Made:
    """The levels of A, times their scale, times DQ(B), and the bias."""
    op, b, bias = site.op, site.needed(1), site.input(4)
    levels, scale, zero_point = _measured(site)
    rounded = op.Mul(op.Sub(levels, zero_point), scale)
    product = op.MatMul(rounded, dequantize(site, b, site.needed(2), site.input(3), column_axis(site, b)))
    return product if bias is None else op.Add(product, bias)
