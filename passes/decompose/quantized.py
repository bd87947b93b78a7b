"""Quantized operators that say what they compute by scales: Q/DQ around the operator in floating point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmc.passes.decompose.families import Family, Made, Site, StaysError
from llmc.passes.graph import Tensor

QUANTIZED = Family()


def dequantized(site: Site, index: int, *, axis: int | None = None) -> Tensor:
    """The float32 value of input `index`, whose scale and zero point are the next two inputs."""
    return dequantize(site, site.needed(index), site.needed(index + 1), site.input(index + 2), axis)


def dequantize(site: Site, x: Tensor, scale: Tensor, zero: Tensor | None, axis: int | None) -> Tensor:
    """DequantizeLinear: with one scale for all where `scale` has one element, else along `axis`."""
    scale, zero, many = _parameters(site, scale, zero)
    if many and axis is None:
        raise StaysError(f"'{scale.name}' has more than one element, along no axis")
    return site.op.DequantizeLinear(x, scale, zero, axis=axis if many else None)


def quantized(site: Site, y: Tensor, index: int, dtype: np.dtype[Any]) -> Tensor:
    """QuantizeLinear by the scale and zero point that are inputs `index` and the next; without one, 0 of `dtype`."""
    scale, zero, many = _parameters(site, site.needed(index), site.input(index + 1))
    if many:
        raise StaysError(f"'{scale.name}' has more than one element")
    return site.op.QuantizeLinear(y, scale, zero if zero is not None else np.zeros((), dtype))


def _parameters(site: Site, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """Both as scalars, or as vectors of one length."""
    op, shape = site.op, site.shape(scale)
    if shape in ([], [1]):
        flat = np.zeros(0, np.int64)
        scale = op.Reshape(scale, flat) if shape else scale
        if zero is not None and site.rank(zero):
            zero = op.Reshape(zero, flat)
        return scale, zero, False
    if len(shape) != 1:
        raise StaysError(f"'{scale.name}' has shape {shape}")
    if zero is not None and site.shape(zero) != shape:
        zero = op.Expand(zero, np.array(shape))
    return scale, zero, True


def column_axis(site: Site, weight: Tensor) -> int:
    return site.rank(weight) - 1


@QUANTIZED.decomposes("QLinearMatMul", domain="")
@QUANTIZED.decomposes("QLinearMatMul")
def qlinear_matmul(site: Site) -> Made:
    """Q(DQ(A) · DQ(B))."""
    a, b = site.needed(0), site.needed(3)
    row = site.rank(a) - 2 if site.rank(a) > 1 else None
    if site.shape(site.needed(1)) not in ([], [1]) and site.rank(a) != 2:
        raise StaysError("it has a scale for each row of a batch of matrices")
    product = site.op.MatMul(dequantized(site, 0, axis=row), dequantized(site, 3, axis=column_axis(site, b)))
    return quantized(site, product, 6, site.dtype(site.needed(7)))


@QUANTIZED.decomposes("QLinearConv", domain="")
@QUANTIZED.decomposes("QLinearConv")
def qlinear_conv(site: Site) -> Made:
    """Q(Conv(DQ(X), DQ(W), B · scale of X · scale of W))."""
    op, options = site.op, dict(site.node.attrs)
    last = options.pop("channels_last", 0)
    bias = site.input(8)
    if bias is not None:
        scale = op.Mul(_scalar_or_row(site, 1), _scalar_or_row(site, 4))
        bias = op.Mul(op.Cast(bias, to=1), scale)
    x = dequantized(site, 0)
    product = op.Conv(_first(site, x) if last else x, dequantized(site, 3, axis=0), bias, **options)
    return quantized(site, _last(site, product) if last else product, 6, site.dtype(site.needed(7)))


def _scalar_or_row(site: Site, index: int) -> Tensor:
    return site.op.Reshape(site.needed(index), np.array([-1]))


def _first(site: Site, x: Tensor) -> Tensor:
    """Channels from the last axis to the second."""
    rank = site.rank(x)
    return site.op.Transpose(x, perm=[0, rank - 1, *range(1, rank - 1)])


def _last(site: Site, x: Tensor) -> Tensor:
    rank = site.rank(x)
    return site.op.Transpose(x, perm=[0, *range(2, rank), 1])


# com.microsoft


def _elementwise(site: Site, operator: str) -> Made:
    made = getattr(site.op, operator)(dequantized(site, 0), dequantized(site, 3))
    return quantized(site, made, 6, site.dtype(site.needed(0)))


@QUANTIZED.decomposes("QLinearAdd")
def qlinear_add(site: Site) -> Made:
    """Q(DQ(A) + DQ(B))."""
    return _elementwise(site, "Add")


@QUANTIZED.decomposes("QLinearMul")
def qlinear_mul(site: Site) -> Made:
    """Q(DQ(A) · DQ(B))."""
    return _elementwise(site, "Mul")


def _unary(site: Site, function: Callable[[Tensor], Tensor]) -> Made:
    return quantized(site, function(dequantized(site, 0)), 3, site.dtype(site.needed(0)))


@QUANTIZED.decomposes("QLinearSigmoid")
def qlinear_sigmoid(site: Site) -> Made:
    """Q(σ(DQ(X)))."""
    return _unary(site, site.op.Sigmoid)


@QUANTIZED.decomposes("QLinearLeakyRelu")
def qlinear_leaky_relu(site: Site) -> Made:
    """Q(LeakyRelu(DQ(X)))."""
    return _unary(site, lambda x: site.op.LeakyRelu(x, alpha=site.attribute("alpha")))


@QUANTIZED.decomposes("QLinearSoftmax")
def qlinear_softmax(site: Site) -> Made:
    """Q(Softmax(DQ(X))), over all axes from `axis` on where it is a Softmax from before opset 13."""
    axis = site.attribute("axis", -1)
    if site.attribute("opset", 13) < 13 and axis % site.rank(site.needed(0)) != site.rank(site.needed(0)) - 1:
        raise StaysError(f"it is Softmax of opset {site.attribute('opset')} over more than the last axis")
    return _unary(site, lambda x: site.op.Softmax(x, axis=axis))


@QUANTIZED.decomposes("QLinearAveragePool")
def qlinear_average_pool(site: Site) -> Made:
    """Q(AveragePool(DQ(X)))."""
    options = dict(site.node.attrs)
    last = options.pop("channels_last", 0)

    def pooled(x: Tensor) -> Tensor:
        made: Tensor = site.op.AveragePool(_first(site, x) if last else x, **options)
        return _last(site, made) if last else made

    return _unary(site, pooled)


@QUANTIZED.decomposes("QLinearGlobalAveragePool")
def qlinear_global_average_pool(site: Site) -> Made:
    """Q(GlobalAveragePool(DQ(X)))."""
    last = site.attribute("channels_last", 0)

    def pooled(x: Tensor) -> Tensor:
        made: Tensor = site.op.GlobalAveragePool(_first(site, x) if last else x)
        return _last(site, made) if last else made

    return _unary(site, pooled)


@QUANTIZED.decomposes("QLinearReduceMean")
def qlinear_reduce_mean(site: Site) -> Made:
    """Q(ReduceMean(DQ(X)))."""
    axes, keep = site.attribute("axes"), site.attribute("keepdims", 1)
    return _unary(site, lambda x: site.op.ReduceMean(x, axes=axes, keepdims=keep))


@QUANTIZED.decomposes("QLinearConcat")
def qlinear_concat(site: Site) -> Made:
    """Q(Concat(DQ(X), …))."""
    parts = [dequantized(site, index) for index in range(2, len(site.node.inputs), 3)]
    made = site.op.Concat(*parts, axis=site.attribute("axis"))
    return quantized(site, made, 0, site.dtype(site.needed(1)))


@QUANTIZED.decomposes("QLinearWhere")
def qlinear_where(site: Site) -> Made:
    """Q(Where(condition, DQ(X), DQ(Y)))."""
    made = site.op.Where(site.needed(0), dequantized(site, 1), dequantized(site, 4))
    return quantized(site, made, 7, site.dtype(site.needed(8)))


@QUANTIZED.decomposes("QGemm")
def qgemm(site: Site) -> Made:
    """Q(Gemm(DQ(A), DQ(B), C · α · scale of A · scale of B)), or the product itself where it has no output scale."""
    op, alpha = site.op, site.attribute("alpha", 1.0)
    transposed = {name: site.attribute(name) for name in ("transA", "transB")}
    bias = site.input(6)
    if bias is not None:
        scale = op.Mul(_scalar_or_row(site, 1), _scalar_or_row(site, 4))
        bias = op.Mul(op.Cast(bias, to=1), op.Mul(scale, np.float32(alpha)) if alpha != 1 else scale)
    b = dequantized(site, 3, axis=0 if transposed["transB"] else 1)
    made = op.Gemm(dequantized(site, 0), b, bias, alpha=alpha, **transposed)
    return made if site.input(7) is None else quantized(site, made, 7, site.dtype(site.needed(8)))


@QUANTIZED.decomposes("MatMulIntegerToFloat")
def matmul_integer_to_float(site: Site) -> Made:
    """DQ(A) · DQ(B) + bias."""
    a, b = site.needed(0), site.needed(1)
    product = site.op.MatMul(
        dequantize(site, a, site.needed(2), site.input(4), None),
        dequantize(site, b, site.needed(3), site.input(5), column_axis(site, b)),
    )
    bias = site.input(6)
    return product if bias is None else site.op.Add(product, bias)


@QUANTIZED.decomposes("QuantizeLinear", opset=21)
def quantize_linear(site: Site) -> Made:
    """QuantizeLinear under its old domain, which had 4 and 16 bits before ONNX did."""
    axis, zero = site.attribute("axis"), site.input(2)
    scale, zero, many = _parameters(site, site.needed(1), zero)
    return site.op.QuantizeLinear(site.needed(0), scale, zero, axis=axis if many else None)


@QUANTIZED.decomposes("DequantizeLinear", opset=21)
def dequantize_linear(site: Site) -> Made:
    """DequantizeLinear under its old domain."""
    scale, zero, many = _parameters(site, site.needed(1), site.input(2))
    return site.op.DequantizeLinear(site.needed(0), scale, zero, axis=site.attribute("axis") if many else None)


@QUANTIZED.decomposes("NhwcMaxPool")
def nhwc_max_pool(site: Site) -> Made:
    """MaxPool, its input turned to NCHW and back."""
    return _last(site, site.op.MaxPool(_first(site, site.needed(0)), **site.node.attrs))
