"""Whole layers of com.microsoft on quantized weights: the layer in floating point, on what they dequantize to."""

from __future__ import annotations

from llmc.passes.decompose.attention import packed_attention
from llmc.passes.decompose.families import Family, Made, Site
from llmc.passes.decompose.normalizations import embedded
from llmc.passes.decompose.quantized import dequantize
from llmc.passes.graph import Tensor

QUANTIZED_LAYERS = Family()


@QUANTIZED_LAYERS.decomposes("QAttention", opset=23)
def qattention(site: Site) -> Made:
    """Attention of DQ(X) and DQ(W)."""
    x = dequantize(site, site.needed(0), site.needed(3), site.input(6), None)
    weight = dequantize(site, site.needed(1), site.needed(4), site.input(7), 1)
    return packed_attention(site, x, weight, site.needed(2), mask=site.input(5), past=site.input(8))


@QUANTIZED_LAYERS.decomposes("QEmbedLayerNormalization", opset=17)
def qembed_layer_normalization(site: Site) -> Made:
    """EmbedLayerNormalization of DQ of its tables."""

    def table(index: int) -> Tensor | None:
        if site.input(index) is None:
            return None
        return dequantize(site, site.needed(index), site.needed(index + 6), site.input(index + 11), None)

    return embedded(site, [table(index) for index in range(2, 7)])
