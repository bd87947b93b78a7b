"""Follows what depends on how full a growing cache is: axes that are as long as it, and numbers computed from that.

A growing cache holds `past` tokens, and `total` = `past` + new ones with those of this run. Where it has room for more
than that, each tensor along it may have more elements, too, if the first `total` of them stay what they were: true of
whatever computes element by element, or along other axes. Attention reads along it (an operator, or spelled out: see
`spelled_scores.py`). All else is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from llmc.passes.cache.spelled_scores import Edge, SpelledScores
from llmc.passes.graph import Graph, Node, Tensor, scopes
from llmc.passes.match import attribute, called
from llmc.passes.shapes.dimension import ONE, UNKNOWN, Dimension, product
from llmc.passes.shapes.dimensions import Dimensions
from llmc.passes.shapes.shape_rules import BROADCAST, VALUE_RULES
from llmc.passes.simplify.index_grids import taken_whole

POINTWISE = {*BROADCAST, "Abs", "Cast", "Clip", "Identity", "IsInf", "IsNaN", "Log", "Neg", "Not", "Sign", "Tanh"}
"""Operators that compute each element of elements at its place."""
MOVES = {"CumSum", "Squeeze", "Transpose", "Trilu", "Unsqueeze"}
"""Others of which the first elements along an axis do not depend on those behind them."""
SIZES = {("ConstantOfShape", 0), ("Expand", 1), ("Range", 1), ("Reshape", 1)}
"""Operators and the position of the input that is the size of what they make."""
OF_NUMBERS = POINTWISE | {"Trilu"}
"""Operators that may compute with the number of tokens in a cache."""


class NotStaticError(Exception):
    """The first thing that keeps the caches growing, and the node it was found at."""

    def __init__(self, node: Node | None, reason: str) -> None:
        super().__init__(reason)
        self.node = node


@dataclass
class Growth:
    """What depends on how full the caches are."""

    axes: dict[int, tuple[Tensor, list[int]]] = field(default_factory=dict)
    """By id each tensor with axes of `total` elements, and those axes."""
    sizes: list[Edge] = field(default_factory=list)
    """Inputs that are sizes."""
    numbers: list[Edge] = field(default_factory=list)
    """Inputs that are numbers to compute with."""
    indices: list[Edge] = field(default_factory=list)
    """Inputs that say what is looked up for each token: there may be no such thing where no token is."""
    ranges: list[Node] = field(default_factory=list)
    """Range nodes that begin at a number to compute with."""
    attentions: list[Node] = field(default_factory=list)
    """Attention nodes whose keys and values are caches."""


class GrowthFollower:
    """Looks at a graph whose caches hold `past` tokens before the run and `total` after it."""

    def __init__(self, graph: Graph, dims: Dimensions, past: Dimension, total: Dimension) -> None:
        self.graph, self.dims, self.past, self.total = graph, dims, past, total
        ((self.symbol,),) = [symbols for symbols, _ in past.terms]
        self.found = Growth()
        self.scores = SpelledScores(dims, total)
        self._counted: set[int] = set()

    def follow(self, caches: Iterable[Node], pasts: Iterable[Tensor], sources: Iterable[Tensor]) -> Growth:
        """All that depends on `pasts`, which `caches` read, and on other inputs `sources`. Raises NotStaticError."""
        known = {id(node) for node in caches}
        self._pasts = {id(tensor) for tensor in pasts}
        given = {id(tensor) for tensor in sources}
        for tensor in self.graph.inputs:
            shape = self.dims.of(tensor) or ()
            if id(tensor) in given:
                self._add(tensor, None)
            elif id(tensor) not in self._pasts and self.mentions(shape):
                text = ", ".join(map(str, shape))
                raise NotStaticError(None, f"the input '{tensor.name}' [{text}] is as long as the cache, too")
        for node in self.graph.nodes:
            if id(node) in known:
                for tensor in node.outputs:
                    if self.mentions(self.dims.of(tensor) or ()):
                        self._add(tensor, node)
                if node.op != "Attention":
                    continue
            self._node(node, id(node) in known)
        for tensor in self.graph.outputs:
            grown = id(tensor) in self.found.axes and not (tensor.inputs and id(tensor.inputs[0]) in known)
            if grown or id(tensor) in self._counted:
                raise NotStaticError(None, f"the output '{tensor.name}' depends on how full the cache is")
        return self.found

    def static(self, size: Dimension, length: int) -> Dimension | None:
        """The size where `length` stands for `total`; None where it is not a multiple of that."""
        if not self.mentions([size]):
            return size
        terms = [(list(symbols), factor) for symbols, factor in size.terms if self.symbol in symbols]
        for symbols, _ in terms:
            symbols.remove(self.symbol)
        multiple = Dimension(frozenset((tuple(symbols), factor) for symbols, factor in terms))
        if self.mentions([multiple]) or multiple * self.total != size:
            return None
        return multiple * Dimension.of(length)

    def mentions(self, sizes: Iterable[Dimension | bool | None]) -> bool:
        """Whether one of them depends on how full the cache is."""
        symbols = {s for size in sizes if isinstance(size, Dimension) for product, _ in size.terms for s in product}
        return any(s == self.symbol or (s.startswith("min(") and self.symbol in s) for s in symbols)

    def _add(self, tensor: Tensor, node: Node | None) -> None:
        """Note the axes of a tensor that is computed from what grows."""
        shape = self.dims.of(tensor)
        if shape is None or any(s[0] == UNKNOWN for size in shape for symbols, _ in size.terms for s in symbols):
            raise NotStaticError(node, f"the shape of '{tensor.name}', computed from the cache, is not known")
        grown = [axis for axis, size in enumerate(shape) if self.mentions([size])]
        if any(shape[axis] != self.scores.length(tensor) for axis in grown):
            text = ", ".join(map(str, shape))
            raise NotStaticError(node, f"'{tensor.name}' [{text}] has an axis that is not as long as the cache")
        if grown:
            self.found.axes[id(tensor)] = (tensor, grown)

    def _node(self, node: Node, is_cache: bool) -> None:
        grown = [i for i, t in enumerate(node.inputs) if id(t) in self.found.axes]
        counted = [i for i, t in enumerate(node.inputs) if id(t) in self._counted]
        pasts = [i for i, t in enumerate(node.inputs) if id(t) in self._pasts and not is_cache]
        self._check_subgraphs(node)
        if not grown and not counted and not pasts and not (is_cache and node.op == "Attention"):
            return
        if not node.domain and self._is_arithmetic(node):
            if counted or self.mentions(self.dims.values(node.outputs[0]) or ()):
                self._counted.update(id(tensor) for tensor in node.outputs)
            return
        if pasts:
            raise NotStaticError(node, f"the cache '{node.inputs[pasts[0]].name}' goes to {called(node)}, too")
        for index in counted:
            self._edge(node, index)
        if node.op == "Attention" and not node.domain:
            self._attention(node, grown, is_cache)
            return
        axes = {index: self.found.axes[id(node.inputs[index])][1] for index in grown}
        if grown and (node.domain or not (self.scores.take(node, axes) or self._keeps_first(node, grown))):
            raise NotStaticError(node, f"{called(node)} computes along the cache")
        for tensor in node.outputs:
            self._add(tensor, node)

    def _is_arithmetic(self, node: Node) -> bool:
        """Whether a node computes a few integers, each of which is known in terms of the graph's dimensions."""
        values = self.dims.values(node.outputs[0]) if node.op in VALUE_RULES and node.outputs else None
        return values is not None and None not in values

    def _edge(self, node: Node, index: int) -> None:
        if node.op == "Range" and self.dims.integers(node.inputs[0]) != [0]:
            shape = self.dims.of(node.outputs[0])
            if shape is None or shape[0].is_unknown:
                raise NotStaticError(node, f"the number of elements of {called(node)} is not known")
            if not any(node is found for found in self.found.ranges):
                self.found.ranges.append(node)
        elif (node.op, index) in SIZES or (node.op == "Slice" and index == 2 and self._takes_all(node)):
            self.found.sizes.append((node, index))
        elif node.op in OF_NUMBERS and len(self.dims.values(node.inputs[index]) or ()) == 1:
            self.found.numbers.append((node, index))
        else:
            raise NotStaticError(node, f"{called(node)} reads how full the cache is from '{node.inputs[index].name}'")

    def _check_subgraphs(self, node: Node) -> None:
        inner = [t for graph in node.subgraphs() for scope in scopes(graph) for n in scope.nodes for t in n.inputs]
        for tensor in inner:
            if id(tensor) in self.found.axes or id(tensor) in self._counted or id(tensor) in self._pasts:
                raise NotStaticError(node, f"a subgraph of {called(node)} reads '{tensor.name}', which grows")

    def _attention(self, node: Node, grown: list[int], is_cache: bool) -> None:
        ranks = [len(self.dims.of(tensor) or ()) for tensor in node.inputs[:3]]
        if ranks != [4, 4, 4]:
            raise NotStaticError(node, f"{called(node)} is not known to take [batch, heads, tokens, size]")
        if not is_cache:
            if any(self.found.axes[id(t)][1] != [2] for t in node.inputs[1:3] if id(t) in self.found.axes):
                raise NotStaticError(
                    node, f"the keys and values of {called(node)} are not [batch, heads, tokens, size]"
                )
            if 0 in grown or not {1, 2} <= set(grown):
                raise NotStaticError(node, f"{called(node)} reads the cache, but not as its keys and its values")
            if node.attrs.get("is_causal", 0):
                raise NotStaticError(node, f"{called(node)} is causal from the first token of the cache on")
        mask = self.dims.of(node.inputs[3]) if len(node.inputs) > 3 and not node.inputs[3].is_empty() else None
        if mask is not None and (mask[-1] not in (ONE, self.total) or self.mentions(mask[:-1])):
            raise NotStaticError(node, f"the mask of {called(node)} is not [..., new tokens, tokens in the cache]")
        if any(not tensor.is_empty() for tensor in node.inputs[6:]) or len(node.outputs) > (3 if is_cache else 1):
            raise NotStaticError(node, f"{called(node)} has lengths of its own, or gives back its scores")
        self.found.attentions.append(node)

    def _keeps_first(self, node: Node, grown: list[int]) -> bool:
        """Whether the first elements along the cache are computed from the first elements alone."""
        if any(id(node.inputs[index]) in self.scores.further for index in grown):
            return False
        if node.op in POINTWISE:
            return all(self._stays(self.found.axes[id(node.inputs[i])], node.outputs[0]) for i in grown)
        axes = self.found.axes[id(node.inputs[0])][1] if 0 in grown else []
        rank = len(self.dims.of(node.inputs[0]) or ())
        if node.op == "Expand":
            return grown == [0] and self._stays(self.found.axes[id(node.inputs[0])], node.outputs[0])
        if node.op in MOVES:
            return grown == [0] and not (node.op == "CumSum" and node.attrs.get("reverse", 0))
        if node.op == "Reshape":
            return grown == [0] and self._keeps_axes(node)
        if node.op in ("Gather", "GatherND") and taken_whole(self.dims, node) is not None:
            return True
        if (
            node.op == "Gather"
            and grown == [1]
            and self.found.axes[id(node.inputs[1])][1] == [self._last(node.inputs[1])]
        ):
            self.found.indices.append((node, 1))
            return True
        if node.op == "Gather":
            return grown == [0] and node.attrs.get("axis", 0) % rank not in axes
        if node.op == "Slice" and self._takes_all(node):
            return True
        if node.op == "Slice":
            sliced = attribute(node, "axes")
            return grown == [0] and sliced is not None and not {axis % rank for axis in sliced} & set(axes)
        if node.op == "Concat":
            return all(node.attrs["axis"] % rank not in self.found.axes[id(node.inputs[i])][1] for i in grown)
        return False

    def _last(self, tensor: Tensor) -> int:
        return len(self.dims.of(tensor) or ()) - 1

    def _takes_all(self, node: Node) -> bool:
        """Whether a Slice gives back all along one axis, from the first element on."""
        shape = self.dims.of(node.inputs[0])
        starts = self.dims.integers(node.inputs[1]) if len(node.inputs) > 2 else None
        return shape is not None and shape == self.dims.of(node.outputs[0]) and starts == [0]

    def _stays(self, grown: tuple[Tensor, list[int]], result: Tensor) -> bool:
        """Whether a broadcast leaves the axes of the cache as long as they are."""
        tensor, axes = grown
        shape, rank = self.dims.of(result), len(self.dims.of(tensor) or ())
        return shape is not None and all(shape[axis - rank] == self.total for axis in axes)

    def _keeps_axes(self, node: Node) -> bool:
        """Whether a Reshape leaves the axis of the cache as it is, with as many elements before and behind it."""
        before, after = self.dims.of(node.inputs[0]), self.dims.of(node.outputs[0])
        if before is None or after is None:
            return False
        ends = [[product(s[: i + 1]) for i, n in enumerate(s) if self.mentions([n])] for s in (before, after)]
        return len(ends[0]) == 1 and ends[0] == ends[1]
