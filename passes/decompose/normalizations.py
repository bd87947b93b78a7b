"""Normalisations of com.microsoft, with the additions and activations that they are fused with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.passes.decompose.families import Family, Made, Site
from llmc.passes.graph import Tensor, onnx_dtype

NORMALIZATIONS = Family()
EPSILON = 1e-12
"""SkipLayerNormalization and EmbedLayerNormalization: the default of `epsilon`."""
GROUP_EPSILON = 1e-5
STATISTICS = "the statistics are of use in training only"


@NORMALIZATIONS.decomposes("SkipLayerNormalization", opset=17)
def skip_layer_normalization(site: Site) -> Made:
    """LayerNormalization(X + S + B), and the sum."""
    site.refuse_outputs(1, 2, because=STATISTICS)
    total = _sum(site, site.input(4))
    normal = site.op.LayerNormalization(
        total, site.needed(2), site.input(3), axis=-1, epsilon=site.attribute("epsilon", EPSILON)
    )
    return normal, None, None, total


@NORMALIZATIONS.decomposes("SkipSimplifiedLayerNormalization", opset=23)
def skip_simplified_layer_normalization(site: Site) -> Made:
    """RMSNormalization(X + S + B), and the sum."""
    site.refuse_outputs(1, 2, because=STATISTICS)
    total = _sum(site, site.input(3))
    normal = site.op.RMSNormalization(total, site.needed(2), axis=-1, epsilon=site.attribute("epsilon", EPSILON))
    return normal, None, None, total


@NORMALIZATIONS.decomposes("SimplifiedLayerNormalization", opset=23, domain="")
def simplified_layer_normalization(site: Site) -> Made:
    """ONNX Runtime's name for RMSNormalization, in the domain of ONNX itself."""
    site.refuse_outputs(1, because=STATISTICS)
    names = ("axis", "epsilon", "stash_type")
    given = {name: site.attribute(name) for name in names}
    return site.op.RMSNormalization(site.needed(0), site.needed(1), **given)


@NORMALIZATIONS.decomposes("GroupNorm", opset=21)
def group_norm(site: Site) -> Made:
    """GroupNormalization, its input turned to NCHW and back, and x · σ(x) where it asks for it."""
    return _group_normalized(site, site.needed(0))


@NORMALIZATIONS.decomposes("SkipGroupNorm", opset=21)
def skip_group_norm(site: Site) -> Made:
    """The same of X + S + B, and the sum. S [N, C] is spread over the image."""
    op, skip = site.op, site.needed(3)
    if site.rank(skip) == 2:
        axes = [1, 2] if site.attribute("channels_last", 1) else [2, 3]
        skip = op.Unsqueeze(skip, axes=axes)
    total, bias = op.Add(site.needed(0), skip), site.input(4)
    if bias is not None:
        spread = bias if site.attribute("channels_last", 1) else op.Unsqueeze(bias, axes=[1, 2])
        total = op.Add(total, spread)
    return _group_normalized(site, total), total


def _group_normalized(site: Site, x: Tensor) -> Tensor:
    op, last = site.op, site.attribute("channels_last", 1)
    normal = op.GroupNormalization(
        op.Transpose(x, perm=[0, 3, 1, 2]) if last else x,
        _like(site, site.needed(1), x),
        _like(site, site.needed(2), x),
        num_groups=site.attribute("groups"),
        epsilon=site.attribute("epsilon", GROUP_EPSILON),
    )
    if site.attribute("activation", 0):
        normal = op.Mul(normal, op.Sigmoid(normal))
    return op.Transpose(normal, perm=[0, 2, 3, 1]) if last else normal


def _like(site: Site, parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter in the type of the data: GroupNorm takes float32 ones with float16 data."""
    same = site.dtype(parameter) == site.dtype(x)
    return parameter if same else site.op.Cast(parameter, to=onnx_dtype(x))


def _sum(site: Site, bias: Tensor | None) -> Tensor:
    total = site.op.Add(site.needed(0), site.needed(1))
    return total if bias is None else site.op.Add(total, bias)


@NORMALIZATIONS.decomposes("EmbedLayerNormalization", opset=17)
def embed_layer_normalization(site: Site) -> Made:
    """LayerNormalization of the sum of word, position and segment embeddings; how many words the mask has; the sum."""
    return embedded(site, [site.input(i) for i in range(2, 7)])


def embedded(site: Site, tables: Sequence[Tensor | None]) -> Made:
    """`tables`: the embeddings of words, positions and segments (or None), scale and bias, all in floating point."""
    op, ids, segments = site.op, site.needed(0), site.input(1)
    words, positions, kinds, scale, bias = tables
    total = op.Add(op.Gather(words, ids, axis=0), _position_embedding(site, ids, positions))
    if segments is not None and kinds is not None:
        total = op.Add(total, op.Gather(kinds, segments, axis=0))
    normal = op.LayerNormalization(total, scale, bias, axis=-1, epsilon=site.attribute("epsilon", EPSILON))
    return normal, _word_count(site, ids) if site.wants(1) else None, total


def _position_embedding(site: Site, ids: Tensor, table: Tensor | None) -> Tensor:
    """[B or 1, S, hidden]: the rows of the given positions, or the first S."""
    op, positions = site.op, site.input(8) if site.node.op == "EmbedLayerNormalization" else None
    if positions is not None:
        return op.Gather(table, positions, axis=0)
    length = op.Shape(ids, start=1, end=2)
    return op.Slice(table, np.array([0]), length, np.array([0]))


def _word_count(site: Site, ids: Tensor) -> Tensor:
    """int32 [B]: the ones of each row of the mask, 0 without a mask."""
    op, mask = site.op, site.input(7)
    if mask is None:
        return op.Expand(np.zeros(1, np.int32), op.Shape(ids, start=0, end=1))
    return op.ReduceSum(mask, axes=[1], keepdims=0)
