"""The pass `unflatten-products`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.fuse.unflatten_batches import BatchUnflattener, NotUnflattenedError
from llmc.passes.graph import (
    Constant,
    Derived,
    Graph,
    Node,
    Tensor,
    fresh_names,
    load_values,
    metadata,
    module_of,
    onnx_dtype,
    outputs_of_scopes,
    scopes,
)
from llmc.passes.match import called
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.rewrite import merged_metadata
from llmc.passes.shapes.dimension import ONE, Shape, product
from llmc.passes.shapes.dimensions import Dimensions

RULE, BATCHES = "unflatten", "batches"


class NotFlattenedError(Exception):
    """The first thing that keeps a product on rows."""


@dataclass(frozen=True)
class Rows:
    """`Reshape(product(Reshape(x)))`, in which the first makes rows of x and the last puts them back."""

    x: Tensor
    product: Node
    bias: Tensor | None
    after: Node
    """The Reshape behind the product, or behind the Add of its bias."""


class UnflattenProducts(Pass):
    """Multiplies [batch, sequence, k] and [batch, heads, m, k] as they are, not flattened before and split after.

    x [..., k], weight [k, n], float16, bfloat16, float32 or float64: `Reshape(MatMul(Reshape(x, [-1, k]), weight),
    [..., n])` → `MatMul(x, weight)`; of Gemm, or with an Add before the last Reshape, `Add(MatMul(x, weight), bias)`.
    Keras writes its dense layers like that through tf2onnx, torch its Conv1D of GPT-2 and its linear layers with a
    bias. A weight that Gemm transposes is transposed when it is read. Shapes must prove that the last Reshape gives
    back what the first one took. Left alone: Gemm with alpha or beta, rows that are used elsewhere.

    a [b, h, m, k], c [b, h, k, n]: `Reshape(MatMul(Reshape(a, [b·h, m, k]), Reshape(c, [b·h, k, n])), [b, h, m, n])` →
    `MatMul(a, c)`, as DeBERTa and older decoders multiply queries, keys and values. Transposes, a Softmax, scales and
    sums in between come along; what is added and was not merged from batch and heads is split by a Reshape of its own.
    A row [b, h, n] that was merged to [b·h, 1, n] and is added, as BLOOM adds ALiBi, becomes [b, h, 1, n].

    **Safety:** tolerance; the same sums, the bias added after rounding (float32: 1e-6 of the largest value).

    Source: ONNX operators MatMul-13, Gemm-13 and Reshape-14.
    """

    after: ClassVar = ("fold-constants",)
    safety: ClassVar = "tolerance"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        context.infer_shapes(graph)
        dims, fresh, given_back = Dimensions(graph), fresh_names(graph), outputs_of_scopes(graph)
        for scope in scopes(graph):
            placement = Placement(scope, given_back)
            for node in [n for n in scope.nodes if n.op in ("MatMul", "Gemm") and not n.domain]:
                try:
                    rows = _rows(node, dims, given_back)
                except NotFlattenedError as reason:
                    result.near_misses.append(NearMiss(RULE, node.name, str(reason), module_of(node)))
                    continue
                if rows is not None and context.apply(result, RULE, node):
                    _replace(rows, graph, dims, fresh, placement)
            placement.finish()
            placement = Placement(scope, given_back)
            batches = BatchUnflattener(graph, dims, placement, fresh, given_back)
            for node in [n for n in scope.nodes if n.op == "Reshape" and not n.domain]:
                try:
                    part = batches.find(node)
                except NotUnflattenedError as reason:
                    result.near_misses.append(NearMiss(BATCHES, node.name, str(reason), module_of(node)))
                    continue
                if part is not None and context.apply(result, BATCHES, node):
                    batches.replace(node, part)
            placement.finish()
        return result


def _rows(node: Node, dims: Dimensions, given_back: set[int]) -> Rows | None:
    """A product between two Reshapes; None where there is no such thing. Raises NotFlattenedError where it stays."""
    before = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    rows = dims.of(node.inputs[0])
    if before is None or before.op != "Reshape" or before.domain or (rows is not None and len(rows) != 2):
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    result = node.outputs[0]
    user = _only_user(result, given_back)
    if user is not None and user.op == "Add" and bias is None:
        bias = user.inputs[1] if user.inputs[0] is result else user.inputs[0]
        result = user.outputs[0]
        user = _only_user(result, given_back)
    if user is None or user.op != "Reshape" or user.inputs[0] is not result:
        return None
    if [node.attrs.get(name, default) for name, default in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))] != [1, 1, 0]:
        raise NotFlattenedError(f"{called(node)} has alpha, beta or transA")
    _check_shapes(node, before, user, bias, dims)
    return Rows(before.inputs[0], node, bias, user)


def _only_user(tensor: Tensor, given_back: set[int]) -> Node | None:
    return tensor.outputs[0] if len(tensor.outputs) == 1 and id(tensor) not in given_back else None


def _check_shapes(node: Node, before: Node, after: Node, bias: Tensor | None, dims: Dimensions) -> None:
    x, rows, weight, made = (dims.of(t) for t in (before.inputs[0], *node.inputs[:2], after.outputs[0]))
    if x is None or rows is None or weight is None or made is None or len(weight) != 2 or len(rows) != 2 or len(x) < 2:
        raise NotFlattenedError("the shapes around it are not known")
    width = weight[0 if node.attrs.get("transB", 0) else 1]
    if rows != (product(x[:-1]), x[-1]):
        raise NotFlattenedError(f"{called(before)} makes {_text(rows)} of {_text(x)}: not its rows")
    if made != (*x[:-1], width):
        raise NotFlattenedError(f"{called(after)} makes {_text(made)}, where {_text((*x[:-1], width))} was")
    shape = dims.of(bias) if bias is not None else ()
    if shape is None or any(size != ONE for size in shape[:-1]) or shape[-1:] not in ((), (ONE,), (width,)):
        raise NotFlattenedError(f"'{bias.name if bias is not None else ''}' is no bias of the columns")


def _replace(rows: Rows, graph: Graph, dims: Dimensions, fresh: Callable[[str], str], placement: Placement) -> None:
    op: Any = Builder(graph.opset, fresh, rows.product.name)
    weight = rows.product.inputs[1]
    if rows.product.attrs.get("transB", 0):
        weight = _transposed(weight, fresh) if isinstance(weight, Constant) else op.Transpose(weight, perm=[1, 0])
    made = op.MatMul(rows.x, weight)
    if rows.bias is not None:
        made = op.Add(made, rows.bias)
    for node in op.nodes:
        metadata(node).update(merged_metadata(rows.product, [rows.product]))
    result = rows.after.outputs[0]
    placement.after(rows.after, op.nodes)
    placement.remove(rows.after)
    made.inputs[0].outputs[0] = result
    dims.follow(op.nodes)


def _transposed(weight: Constant, fresh: Callable[[str], str]) -> Constant:
    """The matrix with rows and columns swapped, whenever it is read."""
    held = Constant(weight.name, weight._values)
    shape = (int(weight.shape[1]), int(weight.shape[0]))
    values = Derived(onnx_dtype(weight), shape, lambda: load_values(held).T)
    return Constant(fresh(f"{weight.name}_transposed"), values)


def _text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
