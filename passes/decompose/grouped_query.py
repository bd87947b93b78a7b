"""GroupQueryAttention of com.microsoft."""

from __future__ import annotations

from functools import reduce

import numpy as np

from llmc.passes.decompose.families import Made, Site, StaysError
from llmc.passes.decompose.heads import attend, bias_of, count, length, lowest, split_heads
from llmc.passes.decompose.rotary import rotated
from llmc.passes.graph import Tensor

REFUSED = {
    11: "sinks in its softmax",
    12: "a quantized cache",
    13: "a quantized cache",
    14: "norms of Q and K inside",
    15: "norms of Q and K inside",
}

GROWS = (
    "its past grows, and each sequence of a batch may end elsewhere: Pad makes room for the present. Without padding "
    "behind shorter sequences (`padded: false`), or where past and present are of one size, there is no need"
)


def group_query_attention(site: Site) -> Made:
    """Attention with fewer heads in K and V, rotated by their positions, behind a past that `seqlens_k` measures.

    A batch's sequence b has `seqlens_k[b] + 1` tokens, of which the last S are new (all of them where
    `total_sequence_length` is S: then the past is not read). The new ones go to the cache by TensorScatter.
    Queries and cache beyond the length of a sequence are of no meaning, here as there, and may differ.
    """
    site.refuse_inputs(REFUSED)
    site.refuse_attributes(softcap=0.0, sliding_window_cache=0, qk_output=0, k_quant_type="NONE", v_quant_type="NONE")
    if site.attribute("smooth_softmax", -1) > 0:
        raise StaysError("its softmax is smooth, which no standard operator has")
    site.refuse_outputs(3, because="scores inside the attention")
    if site.input(3) is not None:
        site.require(24)
        if site.input(10) is not None:
            raise StaysError("it has a bias beside its past")
    op, heads = site.op, (site.attribute("num_heads"), site.attribute("kv_num_heads"))
    q, k, v = _parts(site, heads)
    rows = length(op, q, 1)
    first, ends = _places(site, rows)
    if site.attribute("do_rotary", 0):
        q, k = _rotated(site, q, k, heads, first, rows)
    k, v = (split_heads(op, x, heads[1]) for x in (k, v))
    if site.input(3) is not None:
        k, v = (_cached(site, 3 + i, x, first) for i, x in enumerate((k, v)))
    bias = _bias(site, q, rows, length(op, k, 2), first, ends)
    made = attend(site, split_heads(op, q, heads[0]), k, v, bias, heads)
    return made, k, v


def _lengths(site: Site) -> Tensor:
    """int32 [B]; ONNX Runtime takes [B, 1] as well, and onnxruntime-genai's models give that."""
    lengths = site.needed(5)
    return lengths if site.rank(lengths) == 1 else site.op.Reshape(lengths, np.array([-1]))


def _parts(site: Site, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = site.needed(0), site.input(1), site.input(2)
    if k is not None and v is not None:
        return q, k, v
    width = site.size(q, 2)
    size = width // (heads[0] + 2 * heads[1])
    sizes = np.array([heads[0] * size, heads[1] * size, heads[1] * size])
    q, k, v = site.op.Split(q, sizes, axis=-1, outputs=3)
    return q, k, v


def _places(site: Site, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """The position of the first new token, and of the end of each sequence: int64 [B] both.

    Where each ends with the present: [1] the first, and None.
    """
    op = site.op
    if site.padded or site.input(3) is None or _is_shared(site):
        ends = op.Add(op.Cast(_lengths(site), to=7), np.array([1]))
        return _first_new(site, rows, ends), ends
    return op.Shape(site.needed(3), start=2, end=3), None


def _first_new(site: Site, rows: Tensor, ends: Tensor) -> Tensor:
    op = site.op
    if site.input(3) is None:
        return op.Mul(ends, np.array(0))
    total = op.Cast(op.Reshape(site.needed(6), np.zeros(0, np.int64)), to=7)
    return op.Where(op.Equal(total, rows), np.array(0), op.Sub(ends, rows))


def _rotated(
    site: Site, q: Tensor, k: Tensor, heads: tuple[int, int], first: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    op, cos, sin, positions = site.op, site.needed(7), site.needed(8), site.input(9)
    if positions is None:
        positions = op.Add(op.Unsqueeze(first, axes=[1]), count(op, rows))
        if site.rank(first) == 1 and first.shape[0] == 1:
            positions = op.Expand(positions, op.Concat(op.Shape(q, start=0, end=1), np.array([1]), axis=0))
    size = site.size(q, 2) // heads[0]
    partial = 2 * site.size(cos, 1)
    partial = 0 if partial == size else partial
    interleaved = site.attribute("rotary_interleaved", 0)
    q, k = (rotated(op, x, cos, sin, positions, n, partial, interleaved) for x, n in zip((q, k), heads, strict=True))
    return q, k


def _is_shared(site: Site) -> bool:
    """Whether past and present have the same room, as caches have that are never copied."""
    past, outputs = site.needed(3).shape, site.node.outputs
    present = outputs[1].shape if len(outputs) > 1 else None
    return past is not None and present is not None and past[2] == present[2] is not None


def _cached(site: Site, index: int, new: Tensor, first: Tensor) -> Tensor:
    """The past [B, heads, P, size] with the new keys (or values) at their places: as long as the present has to be."""
    op, past = site.op, site.needed(index)
    if not _is_shared(site):
        if not site.padded:
            return op.Concat(past, new, axis=2)
        wanted = op.Cast(op.Reshape(site.needed(6), np.array([1])), to=7)
        missing = op.Max(op.Sub(wanted, op.Shape(past, start=2, end=3)), np.array([0]))
        past = op.Pad(past, op.Concat(np.zeros(6, np.int64), missing, np.array([0]), axis=0))
        if index == 3:
            site.notes.append(GROWS)
    return op.TensorScatter(past, new, first, axis=2)


def _bias(site: Site, q: Tensor, rows: Tensor, total: Tensor, first: Tensor, ends: Tensor | None) -> Tensor | None:
    """[B or 1, 1, S, T]: what each query sees: keys of its sequence, up to its own position, within the window."""
    op, bias, window = site.op, site.input(10), site.attribute("local_window_size", -1)
    keys = count(op, total)
    seen = [] if ends is None else [op.Less(keys, op.Unsqueeze(ends, axes=[1, 2]))]
    if site.attribute("causal", 1):
        positions = op.Unsqueeze(op.Add(op.Unsqueeze(first, axes=[1]), count(op, rows)), axes=[2])
        seen.append(op.LessOrEqual(keys, positions))
        if window > 0:
            seen.append(op.Greater(keys, op.Sub(positions, np.array(window))))
    if not seen:
        return bias
    kept = reduce(op.And, seen)
    made = bias_of(site, op.Unsqueeze(kept, axes=[1]), q, lowest(site, q))
    return made if bias is None else op.Add(made, bias)
