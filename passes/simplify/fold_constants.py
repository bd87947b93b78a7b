"""The pass `fold-constants`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import ClassVar

import numpy as np
import onnx
from pydantic import Field

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.graph import (
    Array,
    Constant,
    Derived,
    Graph,
    Node,
    constant_bytes,
    fresh_names,
    load_values,
    module_of,
    outputs_of_scopes,
    remove_nodes,
    scopes,
    shape_of,
    stored_bytes,
    to_node,
)
from llmc.passes.simplify.evaluate import (
    RefusalError,
    Size,
    check_operator,
    check_values,
    compute,
    evaluate,
    result_sizes,
)

PICK = {"Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze"}
"""Operators through which single dimensions of a shape are followed while others are unknown."""
RECOMPUTED_FROM = 1 << 20
"""Bytes from which a result is computed again whenever its values are asked for, instead of being held in memory."""


class FoldConstants(Pass):
    """Computes what depends on constants only, and shapes that are known, once instead of in every run.

    A node whose inputs are all constants is replaced by its value, of any shape and dtype: `Transpose(W)` → `Wᵀ`.
    Shape arithmetic is followed dimension by dimension: `Gather(Shape(x), 2)` is a constant where dimension 2 of x is
    a number, whatever the others are. Inside subgraphs too, until nothing more is found. Large results are computed
    again when they are read, so that memory does not grow with them.

    Left alone: DequantizeLinear, whose constants are the compressed form; random operators; nodes that make an output
    of the graph; arithmetic in 16-bit and smaller floats, and whatever runtimes do not agree on (integers divided
    with a negative remainder, floats outside the range of the integer they are cast to, NaN).

    **Safety:** tolerance; exact for shapes, integers and moved data, within the rounding of float32 for arithmetic.

    Source: ONNX operator specifications; conditional constant propagation, Wegman and Zadeck, 1991.
    """

    safety: ClassVar = "tolerance"

    growth_limit: int = Field(1 << 20, ge=0, description="Bytes that all folds together may add to the model.")
    quantize: bool = Field(False, description="Also fold QuantizeLinear, so that weights are stored in 8 bits or less.")

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        folder = _Folder(self, graph, context, result)
        while True:
            context.infer_shapes(graph)
            result.near_misses.clear()
            if not folder.sweep():
                return result


class _Folder:
    """One run of the pass. `dimensions` holds what is known of shapes: tensor → integers, None for unknown ones."""

    def __init__(self, settings: FoldConstants, graph: Graph, context: Context, result: PassResult) -> None:
        self.settings, self.graph = settings, graph
        self.context, self.result = context, result
        self.given_back = outputs_of_scopes(graph)
        self.fresh = fresh_names(graph)
        self.added = 0
        self.gone: dict[int, Node] = {}
        self.dimensions: dict[int, Array] = {}

    def sweep(self) -> bool:
        """Fold in graph order; True where shapes may be known now that were not before."""
        before = len(self.gone)
        for scope in scopes(self.graph):
            self.fold_scope(scope)
        if len(self.gone) == before:
            return False
        return any(node.op in ("Shape", "Size") for scope in scopes(self.graph) for node in scope.nodes)

    def fold_scope(self, scope: Graph) -> None:
        """Fold the nodes of one scope."""
        folded: list[Node] = []
        for node in scope.nodes:
            try:
                values = self.value(node)
            except RefusalError as refusal:
                self.result.near_misses.append(NearMiss("fold", node.name, str(refusal), module_of(node)))
                continue
            if values is None:
                continue
            detail = ", ".join(f"{c.dtype.name}{list(c.shape)}" for c in values)
            if self.context.apply(self.result, "fold", node, detail):
                self.replace(node, values, inside=scope is not self.graph)
                folded.append(node)
        if folded:
            remove_nodes(scope, folded)

    def value(self, node: Node) -> list[Constant] | None:
        """The constants that a node's named outputs are; None for a node that has nothing to do with constants."""
        if node.domain not in (None, "", "ai.onnx"):
            return None
        if node.op in ("Shape", "Size"):
            return self.shape_value(node)
        inputs = [tensor for tensor in node.inputs if isinstance(tensor, Constant)]
        if len(inputs) < sum(bool(tensor.name) for tensor in node.inputs):
            return self.followed(node)
        if node.op == "Constant" or any(True for _ in node.subgraphs()):
            return None
        self.check(node, inputs)
        return self.computed(node, inputs)

    def shape_value(self, node: Node) -> list[Constant] | None:
        shape = shape_of(node.inputs[0])
        if shape is None:
            return None
        # Some exporters write 0 or -1 for a dimension that they do not know; nothing is lost by not folding a true 0.
        known = [size if isinstance(size, int) and size > 0 else None for size in shape]
        if node.op == "Shape":
            known = known[node.attrs.get("start", 0) : node.attrs.get("end")]
            self.dimensions[id(node.outputs[0])] = np.array(known, dtype=object)
        if None in known:
            return None
        self.check_outputs(node)
        array = np.array(known if node.op == "Shape" else prod(s for s in known if s is not None), dtype=np.int64)
        return [Constant(node.outputs[0].name, array)]

    def followed(self, node: Node) -> list[Constant] | None:
        """Shape arithmetic on partly known shapes."""
        if node.op == "Cast" and node.attrs["to"] == onnx.TensorProto.INT64:
            dimensions = self.dimensions.get(id(node.inputs[0]))
        elif node.op in PICK:
            dimensions = self.picked(node)
        else:
            return None
        if dimensions is None:
            return None
        self.dimensions[id(node.outputs[0])] = dimensions
        if any(size is None for size in dimensions.reshape(-1)):
            return None
        self.check_outputs(node)
        return [Constant(node.outputs[0].name, dimensions.astype(np.int64))]

    def picked(self, node: Node) -> Array | None:
        """What the operator picks from known and unknown dimensions, which it moves as Python objects."""
        if not any(id(tensor) in self.dimensions for tensor in node.inputs):
            return None
        given: dict[str, Array] = {}
        for position, tensor in enumerate(node.inputs):
            if id(tensor) in self.dimensions and (position == 0 or node.op == "Concat"):
                given[tensor.name] = self.dimensions[id(tensor)]
            elif isinstance(tensor, Constant):
                given[tensor.name] = load_values(tensor)
            elif tensor.name:
                return None
        proto = to_node(node)
        try:
            check_values(proto, given, {})
            (found,) = evaluate(proto, given, self.graph.opset).values()
        except RefusalError:
            return None
        return np.asarray(found, dtype=object)

    def check(self, node: Node, inputs: Sequence[Constant]) -> None:
        """Raise RefusalError where the node is to stay, whatever its values are."""
        self.check_outputs(node)
        if node.op == "DequantizeLinear":
            raise RefusalError("its constants are stored quantized: folding it would undo that")
        if node.op == "QuantizeLinear" and not self.settings.quantize:
            raise RefusalError("folding it is not asked for: set `quantize`")
        check_operator(node.op, inputs)

    def check_outputs(self, node: Node) -> None:
        for tensor in node.outputs:
            if id(tensor) in self.given_back:
                raise RefusalError(f"its result '{tensor.name}' is an output of the graph")

    def computed(self, node: Node, inputs: Sequence[Constant]) -> list[Constant]:
        """The node's results, once it is sure that they are not too large."""
        proto, opset = to_node(node), self.graph.opset
        sizes = result_sizes(proto, inputs, opset)
        growth = sum(stored_bytes(size.dtype, size.count) for size in sizes.values()) - self.freed(node, inputs)
        left = self.settings.growth_limit - self.added
        if growth > left:
            raise RefusalError(f"folding it would add {_in_words(growth)}, {_in_words(left)} of growth are left")
        arrays = compute(proto, inputs, sizes, opset)
        return [_constant(name, array, sizes[name], proto, inputs, opset) for name, array in arrays.items()]

    def freed(self, node: Node, inputs: Sequence[Constant]) -> int:
        """Bytes of the constants that nothing needs any more once the node is gone."""
        return sum(constant_bytes(c) for c in {id(c): c for c in inputs}.values() if self.only_user(node, c))

    def only_user(self, node: Node, constant: Constant) -> bool:
        users = (user for user in constant.outputs if user is not node)
        return id(constant) not in self.given_back and all(id(user) in self.gone for user in users)

    def replace(self, node: Node, values: Sequence[Constant], inside: bool) -> None:
        """Let the node's output tensors be constants; those of subgraphs, which may share names, get new ones."""
        self.added -= self.freed(node, [t for t in node.inputs if isinstance(t, Constant)])
        for tensor, constant in zip([t for t in node.outputs if t.name], values, strict=True):
            self.added += constant_bytes(constant)
            tensor.to_constant(constant._values)
            if inside:
                tensor.name = self.fresh(tensor.name)
        self.gone[id(node)] = node


def _constant(
    name: str, array: Array, size: Size, proto: onnx.NodeProto, inputs: Sequence[Constant], opset: int
) -> Constant:
    if array.nbytes < RECOMPUTED_FROM:
        return Constant(name, array.copy())
    held = [Constant(c.name, c._values) for c in inputs]  # as they are now: another pass may change the tensors
    again: Callable[[], Array] = lambda: evaluate(proto, {c.name: load_values(c) for c in held}, opset)[name]  # noqa: E731
    return Constant(name, Derived(size.dtype, array.shape, again))


def _in_words(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if abs(count) >= 1e5 else f"{count / 1e3:.1f} kB"
