"""The pass `fold-qdq`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.graph import (
    Array,
    Constant,
    Derived,
    Graph,
    Node,
    Tensor,
    Variable,
    fresh_names,
    load_values,
    metadata,
    module_of,
    onnx_dtype,
    operators,
    outputs_of_scopes,
    remove_nodes,
    replace_uses,
    rewire,
    scopes,
)
from llmc.passes.match import called
from llmc.passes.precision.qdq import LEVELS, SIGNED, Grid, along, grid, producer

PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
MOVES = {
    "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Squeeze",
    "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators that give back elements of their first input: the same of levels as of what these stand for."""
MAX_POOL_OPSET = 12
"""From here MaxPool takes 8-bit integers."""
BIAS_TOLERANCE = 1e-3
"""How far the scale of a bias may be from the product of the other two, of which each quantizer rounds for itself."""
Outcome = Literal[True] | None
"""True where a rule did something: no other is then tried at the node."""


class FoldQdq(Pass):
    """Tidies QuantizeLinear and DequantizeLinear (Q, DQ) of models that arrive quantized, for TensorRT to fuse.

    - uint8 levels around zero point 128 → int8 around 0 (uint4: 8), in Q and its DQ; constants of any zero point,
      where int8 holds them without it. TensorRT takes no other zero point.
    - `Q(DQ(q, s, z), s, z)` → `q`.
    - `Op(DQ(q, s, z))` → `DQ(Op(q), s, z)` for Reshape, Transpose, Slice, Gather, MaxPool, Concat (all its inputs by
      one grid) and others that only move elements, where that brings DQ to a product or to the next Q.
    - `Transpose(DQ(W, s, z, axis))` → `DQ(Wᵀ, s, z, axis')` for a constant W.
    - `DQ(B, s)` of an int32 constant, as biases come → the constant B · s. A warning where s is not the product of
      the scales of data and weight.

    A pair that several nodes read stays shared: TensorRT builds the same kernels from it as from a pair for each.

    **Safety:** exact: DQ and then Q by one scale gives back every level of 8 bits, where the scale is a normal number.

    Source: ONNX operators QuantizeLinear and DequantizeLinear; TensorRT developer guide, "Working with Quantized
    Types"; Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference" (2018), for biases.
    """

    after: ClassVar = ("decompose-quantized",)
    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        if operators(graph).isdisjoint({"QuantizeLinear", "DequantizeLinear"}):
            return result
        context.infer_shapes(graph)
        given_back, fresh = outputs_of_scopes(graph), fresh_names(graph)
        for scope in scopes(graph):
            _Scope(scope, graph.opset, given_back, fresh, context, result).fold()
        return result


class _Scope:
    """One graph or subgraph, folded in one walk in graph order."""

    def __init__(
        self,
        scope: Graph,
        opset: int,
        given_back: set[int],
        fresh: Callable[[str], str],
        context: Context,
        result: PassResult,
    ) -> None:
        self.scope, self.opset, self.given_back, self.fresh = scope, opset, given_back, fresh
        self.context, self.result = context, result
        self.exposed = _exposed(scope)
        self.after: dict[int, Node] = {}
        """id of a node → the DQ that moved behind it."""
        self.gone: dict[int, Node] = {}
        self.left: list[Node] = []
        """DQ that may have no reader any more."""

    def fold(self) -> None:
        """Fold what can be."""
        rules: dict[str, tuple[Callable[[Node], Outcome], ...]] = {
            **dict.fromkeys(MOVES, (self.move,)),
            "QuantizeLinear": (self.cancel, self.recentre),
            "DequantizeLinear": (self.fold_bias, self.centre_constant, self.report),
            "Concat": (self.move_concat,),
            "Transpose": (self.transpose_weight, self.move),
        }
        for node in list(self.scope.nodes):
            any(rule(node) for rule in (rules.get(node.op, ()) if not node.domain else ()))
        self._finish()

    def _finish(self) -> None:
        placed = ((node, self.after.get(id(node))) for node in self.scope.nodes)
        self.scope.nodes = [node for pair in placed for node in pair if node is not None]
        for node in self.left:
            unread = all(id(reader) in self.gone for reader in node.outputs[0].outputs)
            if unread and id(node.outputs[0]) not in self.given_back:
                self.gone[id(node)] = node
        if self.gone:
            remove_nodes(self.scope, self.gone.values())

    # Q after DQ

    def cancel(self, node: Node) -> Outcome:
        """Q(DQ(q)) by one grid is q."""
        before = producer(node.inputs[0], "DequantizeLinear")
        if before is None:
            return None
        mine, other = grid(node), grid(before)
        if mine is None or other is None:
            return self._miss("double", node, "its scale, or that of the levels before it, is computed or in blocks")
        if not mine.same(other):
            return self._miss("double", node, f"it quantizes by {mine}, the levels before it stand for {other}")
        if mine.zero.dtype not in LEVELS or not mine.is_normal:
            return self._miss("double", node, f"{mine} may not give back each level")
        if id(node.outputs[0]) in self.given_back:
            return self._miss("double", node, f"'{node.outputs[0].name}' is an output of the graph")
        if not self.context.apply(self.result, "double", node, f"{called(before)} and it undo each other"):
            return None
        replace_uses(node.outputs[0], before.inputs[0])
        self.gone[id(node)] = node
        self.left.append(before)
        return True

    # Zero points

    def recentre(self, node: Node) -> Outcome:
        """Levels around the middle of an unsigned type → the signed type around 0."""
        found, levels = grid(node), node.outputs[0]
        middle = _middle(found)
        if found is None or middle is None:
            return None
        readers = {id(reader): reader for reader in levels.outputs}.values()
        if id(levels) in self.given_back:
            return self._miss("recentre", node, f"'{levels.name}' is an output of the graph")
        for reader in readers:
            there = grid(reader) if reader.op == "DequantizeLinear" and not reader.domain else None
            if there is None or not np.array_equal(there.zero, found.zero):
                return self._miss("recentre", node, f"{called(reader)} reads its levels as they are")
        if not self.context.apply(self.result, "recentre", node, f"{found.zero.dtype} around {middle} → around 0"):
            return None
        signed = SIGNED[found.zero.dtype]
        for user in (node, *readers):
            self._set_zero(user, np.zeros(user.inputs[1].shape, signed))
        node.attrs.pop("output_dtype", None)
        levels.dtype = signed
        return True

    def centre_constant(self, node: Node) -> Outcome:
        """A constant's levels less their zero point, as a signed type around 0."""
        found, levels = grid(node), node.inputs[0]
        if found is None or not isinstance(levels, Constant) or found.zero.dtype not in LEVELS:
            return None
        if found.zero.dtype not in SIGNED and not found.zero.any():
            return None
        signed = SIGNED.get(found.zero.dtype, found.zero.dtype)
        centred = _centred(levels, found)
        values = centred()
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        half = 8 if signed.itemsize == 1 and signed != np.int8 else 128
        if low < -half or high >= half:
            return self._miss(
                "centre-constant",
                node,
                f"less its zero points '{levels.name}' runs from {low} to {high}",
            )
        if not self.context.apply(self.result, "centre-constant", node, f"'{levels.name}' as {signed} around 0"):
            return None
        kind = onnx_dtype(Constant("", np.zeros(1, signed)))
        stored = Derived(kind, tuple(levels.shape), lambda: centred().astype(signed))
        rewire([(node, 0, Constant(self.fresh(f"{levels.name}_centred"), stored))])
        self._set_zero(node, np.zeros(node.inputs[1].shape, signed))
        return True

    def report(self, node: Node) -> Outcome:
        """Say of what stays that TensorRT will refuse it."""
        found = grid(node)
        if found is not None and (found.zero.dtype in SIGNED or found.zero.any()):
            return self._miss("recentre", node, f"{found}: TensorRT takes int8 around 0")
        return None

    def _set_zero(self, node: Node, values: Array) -> None:
        zero = Constant(self.fresh(f"{node.outputs[0].name}_zero_point"), values)
        if len(node.inputs) > 2:
            rewire([(node, 2, zero)])
        else:
            node.inputs.append(zero)

    # Biases

    def fold_bias(self, node: Node) -> Outcome:
        """An int32 constant by its scale, in floating point."""
        levels, found = node.inputs[0], grid(node)
        if found is None or not isinstance(levels, Constant) or levels.dtype != np.int32:
            return None
        if id(node.outputs[0]) in self.given_back:
            return self._miss("bias", node, f"'{node.outputs[0].name}' is an output of the graph")
        if not self.context.apply(self.result, "bias", node, f"'{levels.name}' in {found.scale.dtype}"):
            return None
        for reader in node.outputs[0].outputs:
            self._check_bias(reader, node.outputs[0], found)
        scale = along(found.scale, found.axis, len(levels.shape))
        values = load_values(levels).astype(found.scale.dtype) * scale
        replace_uses(node.outputs[0], Constant(self.fresh(f"{levels.name}_dequantized"), values))
        self.gone[id(node)] = node
        return True

    def _check_bias(self, product: Node, bias: Tensor, found: Grid) -> None:
        if product.op not in PRODUCTS or len(product.inputs) < 3 or product.inputs[2] is not bias:
            return
        factors = [producer(tensor, "DequantizeLinear") for tensor in product.inputs[:2]]
        grids = [grid(factor) for factor in factors if factor is not None]
        if len(grids) < 2 or grids[0] is None or grids[1] is None:
            return
        wanted = grids[0].scale.astype(np.float64) * grids[1].scale.astype(np.float64)
        if not np.allclose(found.scale.astype(np.float64), wanted, rtol=BIAS_TOLERANCE, atol=0):
            self.result.warnings.append(
                f"the scale of bias '{bias.name}' is not the product of the other scales of {called(product)}: "
                "check the quantizer that wrote this model"
            )

    # DQ behind what only moves elements

    def move(self, node: Node) -> Outcome:
        """Op(DQ(q)) → DQ(Op(q))."""
        before = producer(node.inputs[0], "DequantizeLinear") if node.inputs else None
        if before is None or len(node.outputs) != 1 or id(node.outputs[0]) not in self.exposed:
            return None
        found = grid(before)
        problem = self._why_not(node, found)
        if problem is not None:
            return self._miss("move", node, problem)
        if not self.context.apply(self.result, "move", node, f"{called(before)} behind it"):
            return None
        rewire([(node, 0, before.inputs[0])])
        self._place_behind(node, before)
        return True

    def _why_not(self, node: Node, found: Grid | None) -> str | None:
        if found is None or found.axis is not None:
            return "its input has more than one scale, or one that is computed"
        if found.zero.dtype not in (np.int8, np.uint8):
            return f"its levels are {found.zero.dtype}"
        if node.op == "MaxPool" and (self.opset < MAX_POOL_OPSET or float(found.scale) <= 0):
            return "MaxPool does not take these levels"
        return None

    def move_concat(self, node: Node) -> Outcome:
        """Concat(DQ(q), DQ(r)) by one grid → DQ(Concat(q, r))."""
        sources = [producer(tensor, "DequantizeLinear") for tensor in node.inputs]
        known = [source for source in sources if source is not None]
        if not known or id(node.outputs[0]) not in self.exposed:
            return None
        if len(known) < len(sources):
            return self._miss("move", node, "not all its inputs are dequantized")
        grids = [grid(source) for source in known]
        first = grids[0]
        problem = self._why_not(node, first)
        if problem is not None or first is None:
            return self._miss("move", node, problem or "")
        if any(other is None or not first.same(other) for other in grids):
            return self._miss("move", node, "its inputs have different scales")
        if not self.context.apply(self.result, "move", node, f"{len(known)} DequantizeLinear behind it"):
            return None
        rewire([(node, index, source.inputs[0]) for index, source in enumerate(known)])
        self._place_behind(node, known[0])
        self.left.extend(known[1:])
        return True

    def _place_behind(self, node: Node, before: Node) -> None:
        """Let `node` make levels, and a copy of `before` what it made."""
        values = node.outputs[0]
        levels = Variable(self.fresh(f"{values.name}_levels"), before.inputs[0].dtype, values.shape)
        node.outputs[0] = levels
        self.after[id(node)] = self._dequantize(node, [levels, *before.inputs[1:]], values, {})
        self.left.append(before)

    def _dequantize(self, like: Node, inputs: list[Tensor], output: Tensor, attributes: dict[str, Any]) -> Node:
        made = Node("DequantizeLinear", self.fresh(f"{output.name}/DequantizeLinear"), attributes, inputs, [output])
        metadata(made).update(metadata(like))
        return made

    def transpose_weight(self, node: Node) -> Outcome:
        """Transpose(DQ(W)) of a constant W → DQ(Wᵀ)."""
        before = producer(node.inputs[0], "DequantizeLinear")
        found = grid(before) if before is not None else None
        if before is None or found is None or not isinstance(before.inputs[0], Constant):
            return None
        if not self.context.apply(self.result, "transposed-weight", node, f"'{before.inputs[0].name}' is transposed"):
            return None
        levels, order = before.inputs[0], node.attrs.get("perm") or list(range(len(before.inputs[0].shape)))[::-1]
        shape = tuple(levels.shape[i] for i in order)
        stored = Derived(onnx_dtype(levels), shape, lambda: load_values(levels).transpose(order))
        constant = Constant(self.fresh(f"{levels.name}_transposed"), stored)
        output = node.outputs[0]
        node.outputs.clear()
        attributes = {} if found.axis is None else {"axis": order.index(found.axis)}
        self.after[id(node)] = self._dequantize(node, [constant, *before.inputs[1:]], output, attributes)
        self.gone[id(node)] = node
        self.left.append(before)
        return True

    def _miss(self, rule: str, node: Node, reason: str) -> Outcome:
        self.result.near_misses.append(NearMiss(rule, node.name, reason, module_of(node)))
        return None


def _middle(found: Grid | None) -> int | None:
    """The zero point, where it is the middle of an unsigned type throughout."""
    if found is None or found.zero.dtype not in SIGNED:
        return None
    middle = 128 if found.zero.dtype == np.uint8 else 8
    return middle if bool((found.zero.astype(np.int64) == middle).all()) else None


def _centred(levels: Constant, found: Grid) -> Callable[[], Array]:
    """Reads a constant's levels less their zero points, as int16."""
    zero = along(found.zero.astype(np.int16), found.axis, len(levels.shape))
    return lambda: load_values(levels).astype(np.int16) - zero


def _exposed(scope: Graph) -> set[int]:
    """Ids of the tensors that a product or a Q reads, at once or behind operators that only move elements."""
    exposed: set[int] = set()
    for node in reversed(scope.nodes):
        if node.domain or not node.inputs:
            continue
        if node.op in PRODUCTS:
            exposed.update(id(tensor) for tensor in node.inputs[:2])
        elif node.op == "QuantizeLinear":
            exposed.add(id(node.inputs[0]))
        elif node.outputs and id(node.outputs[0]) in exposed:
            if node.op in MOVES:
                exposed.add(id(node.inputs[0]))
            elif node.op == "Concat":
                exposed.update(id(tensor) for tensor in node.inputs)
    return exposed
