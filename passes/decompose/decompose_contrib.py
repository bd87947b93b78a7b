"""The pass `decompose-contrib`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.decompose import decompose_quantized
from llmc.passes.decompose.activations import ACTIVATIONS
from llmc.passes.decompose.attention import ATTENTION
from llmc.passes.decompose.families import MICROSOFT, decompose
from llmc.passes.decompose.normalizations import NORMALIZATIONS
from llmc.passes.decompose.products import PRODUCTS
from llmc.passes.decompose.rotary import ROTARY
from llmc.passes.graph import Graph, module_of, scopes

FAMILIES = (ACTIVATIONS, ATTENTION, NORMALIZATIONS, PRODUCTS, ROTARY)
REFUSALS = {
    "BeamSearch": "a search is a program around the model: export the decoder alone",
    "GreedySearch": "a search is a program around the model: export the decoder alone",
    "Sampling": "a search is a program around the model: export the decoder alone",
    "DecoderMaskedMultiHeadAttention": "it shares the buffers of past and present, which standard operators cannot",
    "MoE": "which experts run depends on the data",
    "QMoE": "which experts run depends on the data",
    "SparseAttention": "its mask depends on block indices",
    "PackedAttention": "it packs a batch without padding: save the model without packing",
    "PackedMultiHeadAttention": "it packs a batch without padding: save the model without packing",
    "PagedAttention": "it reads its cache through page tables",
    "Inverse": "ONNX has no matrix inverse",
    "Tokenizer": "text belongs outside the graph",
}
"""Operators that this pass knows, and can do nothing with."""
UNKNOWN = "no pass spells it out: export or optimize the model without it"
_KNOWN = {
    *(key for family in (*FAMILIES, *decompose_quantized.FAMILIES) for key in family.of),
    *((MICROSOFT, operator) for operator in (*REFUSALS, *decompose_quantized.REFUSALS)),
}
"""Operators that this pass, or decompose-quantized, has a word on."""


class DecomposeContrib(Pass):
    """Spells out ONNX Runtime's own operators (com.microsoft) in standard ONNX, which TensorRT takes.

    What ONNX Runtime's optimizers write: normalisations with their sums (`SkipLayerNormalization(x, s, γ, β, b)` →
    `LayerNormalization(Add(Add(x, s), b), γ, β)`; SkipSimplified…, Simplified… → RMSNormalization; EmbedLayer…,
    GroupNorm), activations (Gelu, BiasGelu, FastGelu, QuickGelu, …), products (FusedMatMul, FusedGemm, FusedConv),
    RotaryEmbedding, and attention (Attention, MultiHeadAttention, GroupQueryAttention → Attention-23, with masks as
    an additive bias of the same values). Any floating type. The opset is raised where needed: to 23, or 24 for a past.

    New keys and values go where the past of their own sequence ends: by TensorScatter into a past that is as long as
    the present, else into one that Pad has made so. Where sequences of a batch never differ in length (`padded:
    false`), they stand behind the past, `Concat(past, new)`.

    **Safety:** tolerance; the same arithmetic, rounded in another order (float32: 1e-5 of the largest value).
    Variants that standard operators cannot say stay, with the reason.

    Source: ONNX Runtime, ContribOperators.md; ONNX operators Attention-23, RMSNormalization-23,
    RotaryEmbedding-23, Gelu-20, GroupNormalization-21, LayerNormalization-17.
    """

    safety: ClassVar = "tolerance"

    padded: bool = Field(
        True,
        description="Sequences of a batch may differ in length, shorter ones with padding behind.",
    )

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = decompose(graph, context, FAMILIES, REFUSALS, padded=self.padded)
        for scope in scopes(graph):
            for node in scope.nodes:
                if (node.domain or "").startswith(MICROSOFT) and (node.domain, node.op) not in _KNOWN:
                    result.near_misses.append(NearMiss(node.op, node.name, UNKNOWN, module_of(node)))
        return result
