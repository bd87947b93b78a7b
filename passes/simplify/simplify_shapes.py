"""The pass `simplify-shapes`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from llmc.passes.base import Context, Pass, PassResult
from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    fresh_names,
    outputs_of_scopes,
    replace_uses,
    rewire,
    scopes,
)
from llmc.passes.placement import Placement
from llmc.passes.shapes.dimension import ONE, Dimension, Shape
from llmc.passes.shapes.dimensions import Dimensions
from llmc.passes.shapes.shape_rules import takes_all
from llmc.passes.simplify.index_grids import taken_whole

VIEWS = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}
"""Operators that change the shape alone: the elements and their order stay."""


class SimplifyShapes(Pass):
    """Writes shapes that the graph computes in every run as constants, with 0 and -1 for what depends on the inputs.

    Symbolic dimensions are followed through Shape, Gather, Concat and arithmetic as polynomials: of x [b, s, 384],
    `Reshape(x, Concat(Gather(Shape(x), 0), Gather(Shape(x), 1), -1, 32))` → `Reshape(x, [0, 0, 12, 32])`. Reshape and
    Expand to the shape that is there go, and Slice of everything. Gather and GatherND of everything in its order, by an
    index grid made of Ranges, become Reshape; ScatterND of everything becomes what it writes. Small integer tensors
    that turn out to be known become constants, and equal ones are computed once. What only the removed nodes read is
    removed with them.

    **Safety:** exact, for inputs whose shapes agree with the names of their dimensions.

    Source: ONNX IR, "Static tensor shapes"; ONNX operators Reshape-14 and Expand-13.
    """

    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        context.infer_shapes(graph)
        simplifier = _Simplifier(graph, context, result)
        for scope in scopes(graph):
            simplifier.simplify(scope)
        return result


class _Simplifier:
    def __init__(self, graph: Graph, context: Context, result: PassResult) -> None:
        self.context, self.result = context, result
        self.dims = Dimensions(graph)
        self.fresh = fresh_names(graph)
        self.given_back = outputs_of_scopes(graph)

    def simplify(self, scope: Graph) -> None:
        """One walk in graph order."""
        placement = Placement(scope, self.given_back)
        first: dict[tuple[object, ...], Tensor] = {}
        for node in list(scope.nodes):
            if node.domain or not node.outputs:
                continue
            self._known(node, first, placement)
            if node.outputs:
                self._view(node, placement)
        placement.finish()

    def _known(self, node: Node, first: dict[tuple[object, ...], Tensor], placement: Placement) -> None:
        """Small integers: constants, or those that an earlier node has computed."""
        tensor = node.outputs[0]
        values, shape = self.dims.values(tensor), self.dims.of(tensor)
        if not values or shape is None or None in values or id(tensor) in self.given_back or not tensor.outputs:
            return
        numbers = self.dims.integers(tensor)
        earlier: Tensor
        if numbers is not None and tensor.dtype is not None and tensor.dtype.kind == "i":
            sizes = [size.number or 0 for size in shape]
            earlier = Constant(self.fresh(f"{tensor.name}_known"), np.array(numbers, tensor.dtype).reshape(sizes))
        else:
            key = (values, shape, str(tensor.dtype))
            earlier = first.get(key, tensor)
            first[key] = earlier = earlier if earlier.inputs else tensor  # the earlier one may be gone by now
        if earlier is tensor:
            return
        detail = f"'{tensor.name}' is {[str(value) for value in values]}"
        if self.context.apply(self.result, "known-size", node, detail):
            replace_uses(tensor, earlier)
            placement.remove_unused(node)

    def _view(self, node: Node, placement: Placement) -> None:
        """Nodes whose result is another tensor in a shape that a constant can say."""
        after = self.dims.of(node.outputs[0])
        if after is None:
            return
        for source in self._sources(node):
            before = self.dims.of(source)
            if before is None:
                continue
            if before == after and id(node.outputs[0]) not in self.given_back:
                if self.context.apply(self.result, "same-shape", node, f"is '{source.name}'"):
                    replace_uses(node.outputs[0], source)
                    placement.remove_unused(node)
                return
            op = "Expand" if node.op == "Expand" else "Reshape"
            target = _constant_target(op, before, after)
            if target is not None and not (source is node.inputs[0] and _is_constant(node)):
                self._reshape(node, op, source, target, placement)
                return

    def _sources(self, node: Node) -> list[Tensor]:
        """Tensors that have all the node's elements in their order, farthest first."""
        if node.op == "Expand":
            return [node.inputs[0]]
        if node.op == "Slice":  # one that the graph gives back must stay: as a Reshape it would be no better
            gone = id(node.outputs[0]) not in self.given_back and takes_all(self.dims, node)
            return [node.inputs[0]] if gone else []
        if node.op in ("Gather", "GatherND", "ScatterND"):
            whole = taken_whole(self.dims, node)
            found = [whole] if whole is not None else []
        else:
            found = [node.inputs[0]] if node.op == "Reshape" else []
        while found and (maker := next(iter(found[0].inputs), None)) is not None and maker.op in VIEWS:
            found.insert(0, maker.inputs[0])
        return found

    def _reshape(self, node: Node, op: str, source: Tensor, target: list[int], placement: Placement) -> None:
        """Let the node be Reshape or Expand of `source`."""
        if not self.context.apply(self.result, "constant-shape", node, f"'{source.name}' in shape {target}"):
            return
        read = list(node.inputs)
        constant = Constant(self.fresh(f"{node.outputs[0].name}_shape"), np.array(target, dtype=np.int64))
        rewire([(node, 0, source), (node, 1, constant)])
        node.op, node.attrs = op, {}
        for tensor in read:
            if tensor.inputs:
                placement.remove_unused(tensor.inputs[0])


def _is_constant(node: Node) -> bool:
    """Whether a Reshape or Expand has a constant shape already."""
    return node.op in ("Reshape", "Expand") and isinstance(node.inputs[1], Constant)


def _constant_target(op: str, before: Shape, after: Shape) -> list[int] | None:
    """A constant second input that gives the shape `after`; None where there is none."""
    numbers = [size.number for size in after]
    if op == "Expand":
        padded = (ONE,) * (len(after) - len(before)) + before
        kept = [1 if size == old else number for number, size, old in zip(numbers, after, padded, strict=True)]
        return [n for n in kept if n is not None] if None not in kept else None
    target: list[int] = []
    for axis, (number, size) in enumerate(zip(numbers, after, strict=True)):
        copied = axis < len(before) and before[axis] == size
        target.append(number if number is not None else 0 if copied else -1)
    return target if target.count(-1) <= 1 and Dimension.of(0) not in after else None
