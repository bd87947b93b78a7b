"""The shapes of a whole graph in terms of its symbolic dimensions, followed through shape arithmetic.

ONNX's own inference forgets how two unknown sizes hang together (`[batch, sequence, -1, 32]` of 384 columns has 12
heads); what rewrites of attention must prove is just that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import reduce
from math import prod

from llmc.passes.graph import Array, Constant, Graph, Node, Tensor, load_values, scopes, shape_of
from llmc.passes.shapes.dimension import ONE, UNKNOWN, Dimension, Shape, Values
from llmc.passes.shapes.shape_rules import SHAPE_RULES, VALUE_RULES

SMALL = 64
"""Elements. Integer tensors up to this size are followed value by value."""


class Dimensions:
    """The shapes of a graph's tensors, subgraphs included, as they were when this was made."""

    def __init__(self, graph: Graph) -> None:
        self._shapes: dict[int, Shape | None] = {}
        self._values: dict[int, Values | None] = {}
        self._kept: list[Tensor] = []
        self._clipped: dict[Dimension, Dimension] = {}
        self._fresh = itertools.count()
        self.follow(graph.nodes)
        for scope in scopes(graph)[1:]:
            for tensor in scope.inputs:
                self._hold(tensor, self._merge(tensor, None, named=False))
            self.follow(scope.nodes, named=False)

    def follow(self, nodes: Iterable[Node], named: bool = True) -> None:
        """Learn the shapes that nodes make; they read what is known already, or what nodes before them make.

        `named`: whether a size is what the graph names it. Inside a loop it may be another in every round.
        """
        for node in nodes:
            shape_rule = SHAPE_RULES.get(node.op) if not node.domain else None
            shapes = shape_rule(self, node) if shape_rule is not None else None
            for index, tensor in enumerate(node.outputs):
                known = shapes[index] if shapes is not None and index < len(shapes) else None
                self._hold(tensor, self._merge(tensor, known, named))
            rule = VALUE_RULES.get(node.op)
            if rule is not None and not node.domain and self._is_small(node.outputs[0]):
                self._values[id(node.outputs[0])] = rule(self, node)

    def of(self, tensor: Tensor) -> Shape | None:
        """The shape; None where the rank is unknown."""
        if id(tensor) not in self._shapes:
            self._hold(tensor, self._merge(tensor, None, named=True))
        return self._shapes[id(tensor)]

    def values(self, tensor: Tensor) -> Values | None:
        """The elements of a small integer or boolean tensor that is followed; None for any other."""
        if isinstance(tensor, Constant) and id(tensor) not in self._values:
            self._hold(tensor, tuple(Dimension.of(n) for n in tensor.shape))
            followed = prod(tensor.shape) <= SMALL and tensor.dtype.kind in "iub"
            self._values[id(tensor)] = _elements(load_values(tensor)) if followed else None
        return self._values.get(id(tensor))

    def integers(self, tensor: Tensor) -> list[int] | None:
        """The elements as integers, where all are known."""
        numbers = [v.number if isinstance(v, Dimension) else None for v in self.values(tensor) or (None,)]
        return [n for n in numbers if n is not None] if None not in numbers else None

    def unknown(self) -> Dimension:
        """A size of which nothing is known."""
        return Dimension.of(f"{UNKNOWN}{next(self._fresh)}")

    def clipped(self, size: Dimension, limit: int) -> Dimension:
        """The lesser of both. Where it meets `size` in a broadcast, both are the same, or the graph could not run."""
        least = Dimension.of(f"min({limit}, {size})")
        if limit > 1:
            self._clipped[least] = size
        return least

    def broadcast(self, *shapes: Shape | None) -> Shape | None:
        """The shape that operands broadcast to; unknown where two sizes may or may not be 1."""
        if any(shape is None for shape in shapes):
            return None
        known = [shape for shape in shapes if shape is not None]
        rank = max(len(shape) for shape in known)
        padded = [(ONE,) * (rank - len(shape)) + shape for shape in known]
        return tuple(reduce(self._broadcast_sizes, sizes) for sizes in zip(*padded, strict=True))

    def _broadcast_sizes(self, a: Dimension, b: Dimension) -> Dimension:
        if a == b or b == ONE or self._clipped.get(b) == a:
            return a
        if a == ONE or (b.number is not None and b.number > 1) or self._clipped.get(a) == b:
            return b
        return a if a.number is not None and a.number > 1 else self.unknown()

    def _hold(self, tensor: Tensor, shape: Shape | None) -> None:
        self._kept.append(tensor)  # a tensor that died would leave its id to another
        self._shapes[id(tensor)] = shape

    def _merge(self, tensor: Tensor, known: Shape | None, named: bool) -> Shape | None:
        """What was followed, and where that is nothing what the graph says."""
        declared = shape_of(tensor)
        if declared is None or (known is not None and len(known) != len(declared)):
            return known
        followed = known if known is not None else tuple(self.unknown() for _ in declared)
        trusted = [said if named or isinstance(said, int) else None for said in declared]
        return tuple(self._better(size, said) for size, said in zip(followed, trusted, strict=True))

    def _better(self, followed: Dimension, declared: int | str | None) -> Dimension:
        """A number before a name before nothing; names that inference made up (`unk__3`) say nothing."""
        if isinstance(declared, int):
            return Dimension.of(declared) if declared > 0 and followed.number is None else followed
        if not declared or declared.startswith("unk__") or not followed.is_unknown:
            return followed
        return Dimension.named(declared)

    def _is_small(self, tensor: Tensor) -> bool:
        shape = self.of(tensor)
        counts = [size.number for size in shape] if shape is not None else [None]
        return all(n is not None for n in counts) and prod(n for n in counts if n is not None) <= SMALL


def _elements(array: Array) -> Values:
    flat = array.reshape(-1).tolist()
    return tuple(value if isinstance(value, bool) else Dimension.of(value) for value in flat)
