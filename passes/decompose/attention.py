"""Attention and MultiHeadAttention of com.microsoft."""

from __future__ import annotations

import numpy as np

from llmc.passes.decompose.families import Family, Made, Site, StaysError
from llmc.passes.decompose.grouped_query import group_query_attention
from llmc.passes.decompose.heads import (
    add_biases,
    attend,
    causal_bias,
    length,
    padding_bias,
    part_sizes,
    split_heads,
)
from llmc.passes.graph import Tensor

ATTENTION = Family()
ATTENTION.decomposes("GroupQueryAttention", opset=23)(group_query_attention)


@ATTENTION.decomposes("Attention", opset=23)
def attention(site: Site) -> Made:
    """Attention on the three parts of X · W + B; K and V after those of the past, where there is one."""
    x, weight = site.needed(0), site.needed(1)
    return packed_attention(site, x, weight, site.input(2), mask=site.input(3), past=site.input(4), bias=site.input(5))


def packed_attention(
    site: Site,
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    *,
    mask: Tensor | None,
    past: Tensor | None,
    bias: Tensor | None = None,
) -> Made:
    """What Attention does, and QAttention on x and weight in floating point; `shift` is the bias of the projection."""
    site.refuse_attributes(do_rotary=0, past_present_share_buffer=0)
    op = site.op
    sizes = site.attribute("qkv_hidden_sizes") or part_sizes(site.size(weight, 1), 3)
    projected = op.MatMul(x, weight)
    if shift is not None:
        projected = op.Add(projected, shift)
    parts = op.Split(projected, np.array(sizes), axis=-1, outputs=3)
    pasts = [op.Gather(past, np.array(i), axis=0) for i in (0, 1)] if past is not None else None
    made, keys, values = _attended(site, *parts, mask=mask, bias=bias, pasts=pasts)
    present = None
    if site.wants(1):
        present = op.Concat(*(op.Unsqueeze(t, axes=[0]) for t in (keys, values)), axis=0)
    return made, present


@ATTENTION.decomposes("MultiHeadAttention", opset=23)
def multi_head_attention(site: Site) -> Made:
    """Attention on Q, K, V, which come apart or packed, each with its part of the bias."""
    site.refuse_inputs({8: "a past of shared buffers", 9: "a cache that beams share"})
    site.refuse_outputs(3, because="scores inside the attention")
    pasts = [t for t in (site.input(6), site.input(7)) if t is not None]
    q, k, v = _biased(site, *_unpacked(site))
    made, keys, values = _attended(site, q, k, v, mask=site.input(4), bias=site.input(5), pasts=pasts or None)
    return made, keys, values


def _unpacked(site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Q [B, S, hidden]; K and V the same, or both [B, heads, S, size]."""
    op, q, k, v = site.op, site.needed(0), site.input(1), site.input(2)
    flat = np.array([0, 0, -1])
    if k is None:
        if site.rank(q) != 5:
            raise StaysError("it has no key, and its query is not packed")
        parts = op.Split(q, axis=3, num_outputs=3, outputs=3)
        q, k, v = (op.Reshape(part, flat) for part in parts)
        return q, k, v
    if v is None:
        if site.rank(k) != 5:
            raise StaysError("it has no value, and its key is not packed")
        k, v = (op.Reshape(part, flat) for part in op.Split(k, axis=3, num_outputs=2, outputs=2))
        return q, k, v
    if site.rank(k) not in (3, 4) or site.rank(k) != site.rank(v):
        raise StaysError(f"its key has {site.rank(k)} axes, its value {site.rank(v)}")
    return q, k, v


def _biased(site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each with its part of the bias [hidden + hidden + v_hidden]."""
    op, bias = site.op, site.input(3)
    if bias is None:
        return q, k, v
    if site.rank(k) == 4:
        raise StaysError("it has a bias, but its key and value come in heads, already projected")
    hidden, total = site.size(q, 2) if site.input(1) is not None else site.size(bias, 0) // 3, site.size(bias, 0)
    parts = op.Split(bias, np.array([hidden, hidden, total - 2 * hidden]), axis=0, outputs=3)
    return tuple(op.Add(x, part) for x, part in zip((q, k, v), parts, strict=True))


def _attended(
    site: Site, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, bias: Tensor | None, pasts: list[Tensor] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The attention, and all keys and values [B, heads, T, size] where they are an output of the node."""
    op, heads = site.op, site.attribute("num_heads")
    causal = bool(site.attribute("unidirectional", 0))
    in_heads = pasts is not None or site.rank(k) == 4
    if causal and pasts is None:
        _refuse_other_lengths(site, q, k)
    # TensorRT takes a causal order or a mask, not both: beside a mask the order is part of it.
    ordered = causal and not (pasts is None and mask is None and bias is None)
    rows = length(op, q, 1) if ordered else None
    if in_heads or site.wants(1):
        k, v = (x if site.rank(x) == 4 else split_heads(op, x, heads) for x in (k, v))
    if pasts is not None:
        k, v = (op.Concat(old, new, axis=2) for old, new in zip(pasts, (k, v), strict=True))
    like = q
    if site.rank(k) == 4:
        q = split_heads(op, q, heads)
    padding = padding_bias(site, mask, like, k) if mask is not None else None
    order = causal_bias(site, like, rows, length(op, k, site.rank(k) - 2)) if rows is not None else None
    merged = add_biases(op, padding, bias, order)
    made = attend(site, q, k, v, merged, (heads, heads), causal=causal and rows is None)
    return (made, k, v) if site.rank(k) == 4 else (made, None, None)


def _refuse_other_lengths(site: Site, q: Tensor, k: Tensor) -> None:
    """Where query and key differ in length, the kernels of ONNX Runtime do not agree which of them is seen."""
    rows, keys = site.shape(q)[1], site.shape(k)[site.rank(k) - 2]
    if rows is None or rows != keys:
        raise StaysError(f"it is unidirectional, with {rows} queries and {keys} keys")
