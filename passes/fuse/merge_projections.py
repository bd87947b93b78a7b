"""The pass `merge-projections`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.fuse.split_heads import HeadSplitter, NotSplitError
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Rowwise,
    Tensor,
    constant_value,
    fresh_names,
    loaded,
    metadata,
    module_of,
    onnx_dtype,
    operators,
    outputs_of_scopes,
    rows_of,
    scopes,
)
from llmc.passes.match import called
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.rewrite import merged_metadata
from llmc.passes.shapes.dimensions import Dimensions

CACHES = {"Concat", "TensorScatter"}
"""Operators that put new keys or values, their second input, behind those of before."""
PASSED = {"Identity", "LayerNormalization", "RMSNormalization", "Reshape", "RotaryEmbedding", "Transpose"}
"""Operators between a projection and the Attention that it is for."""
NAMES = ("queries", "keys", "values")


class NotMergedError(Exception):
    """The first thing that keeps projections apart."""


@dataclass(frozen=True)
class Projection:
    """`MatMul(x, weight)`, or that plus `bias`, or both in a Gemm."""

    product: Node
    result: Tensor
    weight: Constant
    bias: Constant | None

    @property
    def transposed(self) -> bool:
        """Whether the weight is [width, n]."""
        return bool(self.product.attrs.get("transB", 0))

    @property
    def x(self) -> Tensor:
        return self.product.inputs[0]

    @property
    def width(self) -> int:
        return int(self.weight.shape[0 if self.transposed else 1])


class MergeProjections(Pass):
    """Merges the products that make queries, keys and values of one tensor into one product.

    x [..., n]; Wq [n, a], Wk [n, b], Wv [n, c] and biases [a], [b], [c], float16, bfloat16, float32 or float64; of each
    Attention: `Add(MatMul(x, Wq), bq)`, `Add(MatMul(x, Wk), bk)`, `Add(MatMul(x, Wv), bv)` →
    `Split(Add(MatMul(x, [Wq Wk Wv]), [bq bk bv]), [a, b, c])`. A bias that is missing beside others counts as 0; keys
    and values are merged where only they are made of one tensor. Gemm counts as MatMul and Add. The sizes may differ
    (grouped heads). The merged weights are put together when they are read, so that they take no memory. Left alone:
    weights that others read too, quantized ones, products that are used without their bias, and Gemm with alpha, beta
    or transA.

    Where each part of a Split [b, s, h·d] goes through a Reshape and a Transpose to heads [b, h, s, d], which a cache
    of keys and values needs, these come first, once for all: x [b, s, Σ h·d] →
    `Split(Transpose(Reshape(x, [0, 0, Σ h, d]), [0, 2, 1, 3]), axis=1)`; norms and rotations of each head stay
    behind it.

    **Safety:** tolerance; each number is the same sum, which a kernel for another width may add in another order
    (float32: 1e-6 of the largest value).

    Source: Vaswani et al., Attention Is All You Need, 2017, section 3.2.2.
    """

    after: ClassVar = ("fold-constants", "fuse-attention")
    safety: ClassVar = "tolerance"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        if operators(graph).isdisjoint({"Attention", "Split"}):
            return result
        merger = _Merger(graph, context, result)
        for scope in scopes(graph):
            merger.merge(scope)
        context.infer_shapes(graph)
        dims = Dimensions(graph)
        for scope in scopes(graph):
            merger.split_heads(scope, dims)
        return result


class _Merger:
    def __init__(self, graph: Graph, context: Context, result: PassResult) -> None:
        self.graph, self.context, self.result = graph, context, result
        self.given_back = outputs_of_scopes(graph)
        self.fresh: Callable[[str], str] = fresh_names(graph)

    def merge(self, scope: Graph) -> None:
        """Merge what each Attention of one scope reads."""
        placement = Placement(scope, self.given_back)
        for attention in [n for n in scope.nodes if n.op == "Attention" and not n.domain]:
            try:
                projections = self._mergeable(attention)
            except NotMergedError as reason:
                self.result.near_misses.append(
                    NearMiss("projections", attention.name, str(reason), module_of(attention))
                )
                continue
            widths = " + ".join(str(p.width) for p in projections)
            if self.context.apply(self.result, "projections", projections[0].product, widths):
                self._replace(projections, placement)
        placement.finish()

    def split_heads(self, scope: Graph, dims: Dimensions) -> None:
        """Split into heads before parts are taken apart."""
        placement = Placement(scope, self.given_back)
        splitter = HeadSplitter(self.graph, dims, placement, self.fresh, self.given_back)
        for split in [n for n in scope.nodes if n.op == "Split" and not n.domain]:
            try:
                parts = splitter.parts(split)
            except NotSplitError as reason:
                self.result.near_misses.append(NearMiss("heads", split.name, str(reason), module_of(split)))
                continue
            detail = " + ".join(str(part.heads) for part in parts or ())
            if parts is not None and self.context.apply(self.result, "heads", split, detail):
                splitter.apply(split, parts)
        placement.finish()

    def _mergeable(self, attention: Node) -> list[Projection]:
        """The projections of one tensor behind an Attention. Raises NotMergedError."""
        found = [self._projection(tensor, name) for tensor, name in zip(attention.inputs[:3], NAMES, strict=True)]
        if found[1].x is not found[2].x:
            raise NotMergedError(f"keys are made of '{found[1].x.name}', values of '{found[2].x.name}'")
        alike = [p for p in found if p.x is found[1].x]
        if len({id(p.product) for p in alike}) < len(alike):
            raise NotMergedError("two of its inputs are made by one product")
        if len({onnx_dtype(p.weight) for p in alike}) > 1:
            raise NotMergedError("the weights are of different types")
        return alike

    def _projection(self, tensor: Tensor, name: str) -> Projection:
        while (node := _producer(tensor)) is not None and node.op in PASSED | CACHES and not node.domain:
            if node.op in CACHES and len(node.inputs) < 2:
                break
            tensor = node.inputs[1 if node.op in CACHES else 0]
        result, bias = tensor, None
        if node is not None and node.op == "Add":
            product = next((p for t in node.inputs if (p := _producer(t)) is not None and p.op == "MatMul"), None)
            if product is not None:
                bias = node.inputs[0] if node.inputs[1] is product.outputs[0] else node.inputs[1]
                self._check_bias(product, bias, name)
                node = product
        elif node is not None and node.op == "Gemm" and not node.domain:
            bias = self._gemm_bias(node, name)
        if node is None or node.domain or node.op not in ("MatMul", "Gemm"):
            made = called(node) if node is not None else f"'{tensor.name}', which no node makes"
            raise NotMergedError(f"the {name} come from {made}, where MatMul or Gemm is needed")
        weight = node.inputs[1]
        if not isinstance(weight, Constant) or len(weight.shape) != 2:
            raise NotMergedError(f"the weight '{weight.name}' of the {name} is no constant matrix")
        if len(weight.outputs) > 1 or id(weight) in self.given_back:
            raise NotMergedError(f"the weight '{weight.name}' of the {name} is used elsewhere too")
        return Projection(node, result, weight, bias if isinstance(bias, Constant) else None)

    def _gemm_bias(self, gemm: Node, name: str) -> Tensor | None:
        """What a Gemm that only multiplies by its weight adds to that, if anything."""
        if any(gemm.attrs.get(key, plain) != plain for key, plain in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))):
            raise NotMergedError(f"{called(gemm)} of the {name} has alpha, beta or transA")
        if len(gemm.inputs) < 3 or gemm.inputs[2].is_empty():
            return None
        weight, bias = gemm.inputs[1:3]
        width = None if weight.shape is None else weight.shape[0 if gemm.attrs.get("transB", 0) else 1]
        if not isinstance(bias, Constant) or list(bias.shape) != [width]:
            raise NotMergedError(f"'{bias.name}', added to the {name}, is no bias of their width")
        return bias

    def _check_bias(self, product: Node, bias: Tensor, name: str) -> None:
        weight = product.inputs[1]
        if not isinstance(bias, Constant) or weight.shape is None or list(bias.shape) != list(weight.shape[1:]):
            raise NotMergedError(f"'{bias.name}', added to the {name}, is no bias of their width")
        if len(product.outputs[0].outputs) != 1 or id(product.outputs[0]) in self.given_back:
            raise NotMergedError(f"'{product.outputs[0].name}', the {name} without their bias, is used elsewhere too")

    def _replace(self, projections: Sequence[Projection], placement: Placement) -> None:
        first = projections[0]
        op = Builder(self.graph.opset, self.fresh, first.product.name)
        whole = op.MatMul(first.x, self._weights(projections))
        if any(p.bias is not None for p in projections):
            whole = op.Add(whole, np.concatenate([_bias(p) for p in projections]))
        parts = op.Split(whole, split=[p.width for p in projections], axis=-1, outputs=len(projections))
        for node in op.nodes:
            metadata(node).update(merged_metadata(first.product, [p.product for p in projections]))
        placement.early(op.nodes)
        split = parts[0].inputs[0]
        for index, projection in enumerate(projections):
            maker = projection.result.inputs[0]
            placement.remove(maker)
            split.outputs[index] = projection.result

    def _weights(self, projections: Sequence[Projection]) -> Constant:
        """[W W …], put together whenever it is read."""
        # As they are now, and which way round.
        held = [(p.weight._values, p.transposed) for p in projections]
        first = projections[0]
        shape = (int(first.weight.shape[1 if first.transposed else 0]), sum(p.width for p in projections))

        def joined(rows: slice) -> Array:
            return np.concatenate([loaded(w).T[rows] if turned else rows_of(w, rows) for w, turned in held], axis=1)

        return Constant(self.fresh(f"{first.weight.name}_merged"), Rowwise(onnx_dtype(first.weight), shape, joined))


def _producer(tensor: Tensor) -> Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def _bias(projection: Projection) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    if projection.bias is None:
        return np.zeros(projection.width, projection.weight.dtype)
    value = constant_value(projection.bias)
    assert value is not None
    return value
