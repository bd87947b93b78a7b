"""What the attention operators of com.microsoft share: heads, masks, and the Attention that they become."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.passes.decompose.families import Site, StaysError
from llmc.passes.graph import Array, Tensor

FILTER = -10000.0
"""What masked scores get: the default of `mask_filter_value`."""


def split_heads(op: Any, x: Tensor, heads: int) -> Tensor:
    """[B, S, heads · size] → [B, heads, S, size]."""
    return op.Transpose(op.Reshape(x, np.array([0, 0, heads, -1])), perm=[0, 2, 1, 3])


def merge_heads(op: Any, x: Tensor) -> Tensor:
    """[B, heads, S, size] → [B, S, heads · size]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), np.array([0, 0, -1]))


def length(op: Any, x: Tensor, axis: int) -> Tensor:
    """int64 []: a dimension."""
    return op.Squeeze(op.Shape(x, start=axis, end=axis + 1))


def count(op: Any, end: Tensor) -> Tensor:
    """int64 [end]: 0, 1, …"""
    return op.Range(np.array(0), end, np.array(1))


def attend(
    site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: tuple[int, int], *, causal: bool = False
) -> Tensor:
    """softmax(Q · Kᵀ · scale + bias) · V [B, S, heads · size]; Q, K, V so too, or all of them [B, heads, S, size]."""
    scale = site.attribute("scale", 0.0) or None
    options = {"scale": scale, "is_causal": int(causal) or None}
    if site.rank(q) == 4:
        return merge_heads(site.op, site.op.Attention(q, k, v, bias, **options))
    made: Tensor = site.op.Attention(q, k, v, bias, q_num_heads=heads[0], kv_num_heads=heads[1], **options)
    return made


def bias_of(site: Site, kept: Tensor, like: Tensor, filtered: float) -> Tensor:
    """A bias that adds `filtered` to scores that are not kept."""
    zero, low = site.number(0.0, like), site.number(filtered, like)
    return site.op.Where(kept, zero, low)


def lowest(site: Site, like: Tensor) -> float:
    return {"float16": -65504.0}.get(site.dtype(like).name, float(np.finfo(np.float32).min))


def padding_bias(site: Site, mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """[B, 1, S, T] from a mask of integers: lengths [B], keys [B, T], or keys of each query [B, S, T]."""
    op, rank = site.op, site.rank(mask)
    if rank == 1:
        batch, found = site.shape(q)[0], site.shape(mask)[0]
        if batch is None or batch != found:
            raise StaysError(f"'{mask.name}' has shape [{found}]: it may hold more than the lengths")
        counted = op.Cast(count(op, length(op, k, site.rank(k) - 2)), to=6)
        kept = op.Less(counted, op.Unsqueeze(mask, axes=[1, 2, 3]))
    elif rank in (2, 3):
        kept = op.Greater(op.Unsqueeze(mask, axes=[1, 2] if rank == 2 else [1]), np.array(0, site.dtype(mask)))
    else:
        raise StaysError(f"'{mask.name}' has {rank} axes: a mask of the longest sequence, which only GPUs take")
    bias = bias_of(site, kept, q, site.attribute("mask_filter_value", FILTER))
    return bias if rank == 3 else op.Expand(bias, _one_axis(op, q))


def _one_axis(op: Any, q: Tensor) -> Tensor | Array:
    """int64 [1, 1, S, 1]: ONNX Runtime wants a row of the mask for each query, though ONNX does not."""
    rows = q.shape[1] if q.shape is not None else None
    if isinstance(rows, int):
        return np.array([1, 1, rows, 1])
    made: Tensor = op.Concat(np.array([1, 1]), op.Shape(q, start=1, end=2), np.array([1]), axis=0)
    return made


def causal_bias(site: Site, q: Tensor, rows: Tensor, total: Tensor) -> Tensor:
    """[S, T]: the queries stand at the last S of T positions, and see keys up to their own."""
    op = site.op
    positions = op.Unsqueeze(op.Add(count(op, rows), op.Sub(total, rows)), axes=[1])
    return bias_of(site, op.LessOrEqual(count(op, total), positions), q, lowest(site, q))


def add_biases(op: Any, *biases: Tensor | None) -> Tensor | None:
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    total = given[0]
    for bias in given[1:]:
        total = op.Add(total, bias)
    return total


def part_sizes(total: int, parts: int) -> list[int]:
    """Sizes of equal parts."""
    if total % parts:
        raise StaysError(f"the width of its projection, {total}, is not a multiple of {parts}")
    return [total // parts] * parts
