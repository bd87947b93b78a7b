"""Products of com.microsoft: MatMul, Gemm and Conv with what is fused to them."""

from __future__ import annotations

from typing import Any

from llmc.passes.decompose.families import Family, Made, Site, StaysError
from llmc.passes.graph import Tensor, constant_value

PRODUCTS = Family()
PARAMETERS = {
    "": (),
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "LeakyRelu": ("alpha",),
    "Elu": ("alpha",),
    "ThresholdedRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Selu": ("alpha", "gamma"),
}
"""Fused activation → its parameters, in the order in which FusedConv lists them."""


@PRODUCTS.decomposes("FusedMatMul", "TransposeMatMul")
def fused_matmul(site: Site) -> Made:
    """α · op(A) · op(B), where op transposes the last two axes, or turns the first axis to the last but one."""
    op, alpha = site.op, site.attribute("alpha", 1.0)
    flags = [name for name in ("transA", "transB", "transBatchA", "transBatchB") if site.attribute(name, 0)]
    if flags and 1 in (site.rank(site.needed(0)), site.rank(site.needed(1))):
        raise StaysError(f"it multiplies a vector with {flags[0]}, which is not defined")
    product = op.MatMul(_transposed(site, 0, "A"), _transposed(site, 1, "B"))
    return product if alpha == 1 else op.Mul(product, site.number(alpha, site.needed(0)))


def _transposed(site: Site, index: int, letter: str) -> Tensor:
    tensor = site.needed(index)
    last, batch = site.attribute(f"trans{letter}", 0), site.attribute(f"transBatch{letter}", 0)
    if not last and not batch:
        return tensor
    rank = site.rank(tensor)
    order = list(range(rank))
    if batch and rank > 2:
        order = [*order[1:-1], 0, rank - 1]
    if last:
        order[-2:] = order[:-3:-1]
    return tensor if order == list(range(rank)) else site.op.Transpose(tensor, perm=order)


@PRODUCTS.decomposes("FusedGemm")
def fused_gemm(site: Site) -> Made:
    """activation(Gemm(A, B, C))."""
    activation = site.attribute("activation", "")
    given = {name: site.attribute(f"activation_{name}") for name in PARAMETERS.get(activation, ())}
    options = {name: site.attribute(name) for name in ("alpha", "beta", "transA", "transB")}
    product = site.op.Gemm(site.needed(0), site.needed(1), site.input(2), **options)
    return _activated(site, product, activation, given)


@PRODUCTS.decomposes("FusedConv")
def fused_conv(site: Site) -> Made:
    """activation(Conv(X, W, B) + Z)."""
    activation, values = site.attribute("activation", ""), site.attribute("activation_params") or []
    options = {k: v for k, v in site.node.attrs.items() if k not in ("activation", "activation_params")}
    product, residual = site.op.Conv(site.needed(0), site.needed(1), site.input(2), **options), site.input(3)
    if residual is not None:
        product = site.op.Add(product, residual)
    if activation == "Clip":
        low, high = (site.number(value, site.needed(0)) for value in values)
        return site.op.Clip(product, low, high)
    return _activated(site, product, activation, dict(zip(PARAMETERS.get(activation, ()), values, strict=False)))


def _activated(site: Site, x: Tensor, activation: str, parameters: dict[str, Any]) -> Tensor:
    if activation == "HardSwish":
        return site.op.HardSwish(x)
    if activation not in PARAMETERS:
        raise StaysError(f"its activation is '{activation}', which this pass does not know")
    return getattr(site.op, activation)(x, **parameters) if activation else x


# Operators that ONNX took over later, or had another way


@PRODUCTS.decomposes("ExpandDims")
def expand_dims(site: Site) -> Made:
    """Unsqueeze with one axis, which the operator takes as a scalar."""
    axis = constant_value(site.needed(1))
    if axis is None:
        raise StaysError("its axis is computed")
    return site.op.Unsqueeze(site.needed(0), axes=[int(axis)])


@PRODUCTS.decomposes("Trilu", opset=14)
def trilu(site: Site) -> Made:
    """Trilu under its old domain."""
    return site.op.Trilu(site.needed(0), site.input(1), upper=site.attribute("upper"))


@PRODUCTS.decomposes("GatherND")
def gather_nd(site: Site) -> Made:
    """GatherND under its old domain."""
    return site.op.GatherND(site.needed(0), site.op.Cast(site.needed(1), to=7))
