"""The pass `fuse-attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.fuse.attention_heads import HeadFolder
from llmc.passes.fuse.attention_mask import MaskBuilder
from llmc.passes.fuse.attention_match import AttentionMatcher, NotAttentionError, Site, scale_attribute
from llmc.passes.fuse.repeated_heads import repeated
from llmc.passes.graph import (
    Graph,
    Node,
    dtype_name,
    fresh_names,
    infer_shapes,
    metadata,
    module_of,
    onnx_dtype,
    outputs_of_scopes,
    scopes,
)
from llmc.passes.opset import raise_opset
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.rewrite import merged_metadata
from llmc.passes.shapes.dimension import Dimension, Shape
from llmc.passes.shapes.dimensions import Dimensions

OPSET = 23


class FuseAttention(Pass):
    """Fuses scaled dot-product attention to one Attention node, with no Reshape or Transpose left around it.

    query [b, h, s, d], key [b, k, t, d], value [b, k, t, e], float16, bfloat16, float32 or float64, h a multiple of
    k: `MatMul(Softmax(Add(Mul(MatMul(query, keyᵀ), scale), mask)), value)` → `Attention(query, key, value, mask)`.
    The scale may be a product or a quotient, of the scores, of the queries, of the keys or of several of them; it
    becomes the attribute `scale` unless it is 1/√d. One of at most 1 behind a mask that is added scales that as
    well. Masks are added, or put numbers in place of scores by a boolean; triangles become `is_causal`. Keys and
    values repeated for groups of heads (Unsqueeze, Expand, Reshape), before RotaryEmbedding too, are taken as they
    were. `Where(IsNaN(weights), 0, weights)`, which makes rows masked everywhere 0, goes: Attention does that.

    Where queries, keys and values are [b, s, h·d] before a Reshape and a Transpose split them into heads, and the
    result is put together again, Attention takes and gives [b, s, h·d] itself (`q_num_heads`, `kv_num_heads`). So do
    Attention nodes that were there before, and a RotaryEmbedding between. Shapes must prove the number of heads. Where
    the result is put together as [s, b, h·d], Attention gives [b, s, h·d] to a Transpose.

    Left alone: a row that may be -inf everywhere and is not made 0 (it is NaN, but 0 in Attention; finite numbers such
    as -3.4e38 never do that), weights that are used elsewhere, masks of a shape that is not certain.

    **Safety:** tolerance; the same function, rounded in another order (float32: 1e-5 of the largest value).

    Source: ONNX operator Attention-23; Vaswani et al., Attention Is All You Need, 2017.
    """

    after: ClassVar = ("fold-constants", "fuse-rotary-embedding")
    safety: ClassVar = "tolerance"

    zero_masked_rows: bool = Field(
        False, description="Fuse also where a row of scores may be -inf everywhere: its result, NaN, becomes 0."
    )

    softcap: bool = Field(
        False, description="Fuse also where scores are capped, c · tanh(x / c): TensorRT takes no Attention that does."
    )

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        if not any(node.op in ("Softmax", "Attention") for scope in scopes(graph) for node in scope.nodes):
            return result
        context.infer_shapes(graph)
        if graph.opset < OPSET and _Fusion(self, graph, context, result).finds_any():
            problem = raise_opset(graph, OPSET)
            if problem is not None:
                result.near_misses.append(NearMiss("attention", "", problem))
                return result
            infer_shapes(graph)
        fusion = _Fusion(self, graph, context, result)
        for scope in scopes(graph):
            fusion.fuse(scope)
            fusion.fold_heads(scope)
        return result


class _Fusion:
    """One run of the pass over a graph whose shapes have been inferred."""

    def __init__(self, settings: FuseAttention, graph: Graph, context: Context, result: PassResult) -> None:
        self.settings, self.graph = settings, graph
        self.context, self.result = context, result
        self.dims = Dimensions(graph)
        self.given_back = outputs_of_scopes(graph)
        self.fresh: Callable[[str], str] = fresh_names(graph)
        self.matcher = AttentionMatcher(self.dims, self.given_back, graph.opset)

    def finds_any(self) -> bool:
        """Whether there is anything to fuse."""
        for scope in scopes(self.graph):
            masks = self._masks(Placement(scope, self.given_back))
            for node in scope.nodes:
                try:
                    if node.op == "Softmax":
                        self._site(node, masks)
                        return True
                except NotAttentionError:
                    continue
        return False

    def fuse(self, scope: Graph) -> None:
        """Fuse every attention of one scope."""
        placement = Placement(scope, self.given_back)
        masks = self._masks(placement)
        for node in [n for n in scope.nodes if n.op == "Softmax" and not n.domain]:
            try:
                site, scores = self._site(node, masks)
            except NotAttentionError as reason:
                self.result.near_misses.append(NearMiss("attention", node.name, str(reason), module_of(node)))
                continue
            if self.context.apply(self.result, "attention", site.product, _describe(scores, site)):
                self._replace(site, scores, masks, placement)
        placement.finish()

    def fold_heads(self, scope: Graph) -> None:
        """Let every Attention of one scope take [b, s, h·d], where that is what there is."""
        placement = Placement(scope, self.given_back)
        folder = HeadFolder(self.graph, self.dims, placement, self.fresh, self.given_back)
        for node in [n for n in scope.nodes if n.op == "Attention" and not n.domain]:
            groups = folder.groups(node)
            if groups is not None and self.context.apply(self.result, "groups", node):
                folder.take_groups(node, *groups)
            try:
                plan = folder.plan(node)
            except NotAttentionError as reason:
                self.result.near_misses.append(NearMiss("heads", node.name, str(reason), module_of(node)))
                continue
            if plan is not None and self.context.apply(self.result, "heads", node, plan.describe()):
                folder.fold(node, plan)
        placement.finish()

    def _masks(self, placement: Placement) -> MaskBuilder:
        return MaskBuilder(self.graph, self.dims, placement, self.fresh, self.settings.zero_masked_rows)

    def _site(self, softmax: Node, masks: MaskBuilder) -> tuple[Site, Shape]:
        """The attention around a Softmax and the shape of its scores. Raises NotAttentionError."""
        site = self.matcher.at(softmax)
        if site.softcap and not self.settings.softcap:
            raise NotAttentionError(
                f"its scores are capped at {site.softcap:.6g}, which TensorRT's attention does not do; "
                "`softcap` allows it"
            )
        self._take_groups(site)
        taken = (site.query, site.key, site.value, site.product.outputs[0])
        types = sorted({dtype_name(onnx_dtype(tensor)) for tensor in taken})
        if len(types) > 1:
            raise NotAttentionError(f"queries, keys, values and result are of several types: {', '.join(types)}")
        scores = self._check_shapes(site)
        masks.check(site, scores)
        return site, scores

    def _take_groups(self, site: Site) -> None:
        """Take keys and values as they were before they were repeated for the heads of a group."""
        if site.key_order is not None:
            return
        key, value = (repeated(self.dims, tensor, self.given_back) for tensor in (site.key, site.value))
        if key is not None and value is not None and key.stands and value.stands and key.count == value.count:
            site.key, site.value = key.source, value.source

    def _check_shapes(self, site: Site) -> Shape:
        query, key, value = (self.dims.of(t) for t in (site.query, site.key, site.value))
        if query is None or key is None or value is None or not len(query) == len(key) == len(value):
            raise NotAttentionError("queries, keys and values are not of one known rank")
        if site.key_order is not None:
            key = tuple(key[axis] for axis in site.key_order)
        if len(query) not in (3, 4):
            raise NotAttentionError(f"the queries have rank {len(query)}, not 3 or 4")
        heads = len(query) - 3
        for what, found, wanted in (
            ("batch of the keys", key[0], query[0]),
            ("batch of the values", value[0], query[0]),
            ("size of the keys", key[-1], query[-1]),
            ("number of the values", value[-2], key[-2]),
            ("heads of the values", value[heads], key[heads]),
        ):
            if found != wanted:
                raise NotAttentionError(f"the {what} is {found}, where {wanted} is needed")
        if len(query) == 3:
            return (query[0], query[1], key[1])
        if key[1] != query[1] and (query[1].number is None or key[1].number is None or query[1].number % key[1].number):
            raise NotAttentionError(f"{query[1]} heads of queries do not share {key[1]} heads of keys evenly")
        return (*query[:3], key[2])

    def _replace(self, site: Site, scores: Shape, masks: MaskBuilder, placement: Placement) -> None:
        made = masks.make(site, scores)
        op = Builder(self.graph.opset, self.fresh, site.product.name)
        key = site.key if site.key_order is None else op.Transpose(site.key, perm=site.key_order)
        size = (self.dims.of(site.query) or ())[-1].number
        flat = {"q_num_heads": 1, "kv_num_heads": 1} if len(scores) == 3 else {}
        attention = op.Attention(
            site.query,
            key,
            site.value,
            made.mask,
            **flat,
            scale=scale_attribute(site.scale, size),
            softcap=site.softcap or None,
            is_causal=1 if made.causal else None,
        )
        result = site.product.outputs[0]
        for node in op.nodes:
            metadata(node).update(merged_metadata(site.product, [site.softmax, site.product]))
        placement.after(site.product, op.nodes)
        placement.remove(site.product)
        attention.inputs[0].outputs[0] = result
        self.dims.follow(op.nodes)


def _describe(scores: Shape, site: Site) -> str:
    heads: Dimension | int = scores[1] if len(scores) == 4 else 1
    return f"{heads} heads, scale {site.scale:.6g}"
