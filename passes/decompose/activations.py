"""Activations of com.microsoft, with the additions that they are fused with."""

from __future__ import annotations

from llmc.passes.decompose.families import Family, Made, Site, StaysError
from llmc.passes.graph import Tensor, constant_value

ACTIVATIONS = Family()
QUICK = 1.702
"""QuickGelu: the default of `alpha`."""


@ACTIVATIONS.decomposes("Gelu", "BiasGelu", opset=20)
def gelu(site: Site) -> Made:
    """Gelu(X), Gelu(X + B)."""
    return site.op.Gelu(_biased(site, site.needed(0), 1), approximate="none")


@ACTIVATIONS.decomposes("FastGelu", opset=20)
def fast_gelu(site: Site) -> Made:
    """Gelu(X + B) by its tanh approximation; B may be missing."""
    return site.op.Gelu(_biased(site, site.needed(0), 1), approximate="tanh")


@ACTIVATIONS.decomposes("GemmFastGelu", opset=20)
def gemm_fast_gelu(site: Site) -> Made:
    """Gelu(X · W + B) by its tanh approximation."""
    return site.op.Gelu(_biased(site, site.op.MatMul(site.needed(0), site.needed(1)), 2), approximate="tanh")


@ACTIVATIONS.decomposes("QuickGelu")
def quick_gelu(site: Site) -> Made:
    """x · σ(αx)."""
    x, alpha = site.needed(0), site.attribute("alpha", QUICK)
    return site.op.Mul(x, site.op.Sigmoid(x if alpha == 1 else site.op.Mul(x, site.number(alpha, x))))


@ACTIVATIONS.decomposes("BiasSplitGelu", opset=20)
def bias_split_gelu(site: Site) -> Made:
    """l · Gelu(r), where [l, r] = X + B."""
    op = site.op
    biased = op.Add(site.needed(0), site.needed(1))
    left, right = op.Split(biased, axis=-1, num_outputs=2, outputs=2)
    return op.Mul(left, op.Gelu(right, approximate="none"))


@ACTIVATIONS.decomposes("BiasAdd")
def bias_add(site: Site) -> Made:
    """X + B + S."""
    return site.op.Add(site.op.Add(site.needed(0), site.needed(1)), site.needed(2))


@ACTIVATIONS.decomposes("BiasDropout")
def bias_dropout(site: Site) -> Made:
    """X + B + R: Dropout does nothing at inference."""
    training = site.input(4)
    if training is not None:
        value = constant_value(training)
        if value is None or value.any():
            raise StaysError("it may run in training mode")
    site.refuse_outputs(1, because="the mask of a Dropout has no use at inference")
    biased = site.op.Add(site.needed(0), site.needed(1))
    residual = site.input(2)
    return biased if residual is None else site.op.Add(biased, residual)


def _biased(site: Site, x: Tensor, index: int) -> Tensor:
    bias = site.input(index)
    return x if bias is None else site.op.Add(x, bias)
