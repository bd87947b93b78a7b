"""Rotary position embedding of com.microsoft."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.passes.decompose.families import Family, Made, Site, StaysError
from llmc.passes.graph import Tensor

ROTARY = Family()


@ROTARY.decomposes("RotaryEmbedding", opset=23)
def rotary_embedding(site: Site) -> Made:
    """RotaryEmbedding of ONNX: X [B, S, hidden] or [B, heads, S, size], positions [B, S], or [1] of the first token."""
    site.refuse_attributes(is_packed_batching=0, scale=1.0)
    x, positions, cos = site.needed(0), site.needed(1), site.needed(2)
    partial = site.attribute("rotary_embedding_dim", 0)
    heads = site.attribute("num_heads", 0)
    if site.rank(x) == 3 and not heads:
        heads = site.size(x, 2) // (2 * site.size(cos, 1))
    sequence_axis = 1 if site.rank(x) == 3 else 2
    if site.rank(positions) == 1:
        positions = positions_from(site, positions, x, sequence_axis)
    return rotated(site.op, x, cos, site.needed(3), positions, heads, partial, site.attribute("interleaved", 0))


def rotated(
    op: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int, partial: int, interleaved: int
) -> Tensor:
    made = op.RotaryEmbedding(
        x,
        cos,
        sin,
        positions,
        num_heads=heads or None,
        rotary_embedding_dim=partial or None,
        interleaved=interleaved or None,
    )
    made.shape = x.shape
    return made


def positions_from(site: Site, first: Tensor, x: Tensor, sequence_axis: int) -> Tensor:
    """int64 [B, S]: first [1], first + 1, … for each of the batch."""
    op = site.op
    if site.dtype(first) != np.int64:
        raise StaysError(f"its positions '{first.name}' are not int64")
    length = op.Squeeze(op.Shape(x, start=sequence_axis, end=sequence_axis + 1))
    counted = op.Add(op.Range(np.array(0), length, np.array(1)), first)
    shape = op.Concat(op.Shape(x, start=0, end=1), np.array([1]), axis=0)
    return op.Expand(op.Unsqueeze(counted, axes=[0]), shape)
