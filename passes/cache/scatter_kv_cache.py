"""The pass `scatter-kv-cache`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
from pydantic import Field

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.cache.caches import Cache, growing_caches, read_cache
from llmc.passes.cache.grown_axis import Growth, GrowthFollower, NotStaticError
from llmc.passes.cache.static_cache import AXIS, StaticCache
from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    Variable,
    fresh_names,
    metadata,
    module_of,
    onnx_dtype,
    outputs_of_scopes,
    rewire,
)
from llmc.passes.match import called
from llmc.passes.opset import raise_opset
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.shapes.dimension import Dimension
from llmc.passes.shapes.dimensions import Dimensions
from llmc.passes.shapes.shape_vectors import shape_vector

OPSET = 24
RULE = "cache"


class ScatterKvCache(Pass):
    """Gives growing caches of keys and values a fixed length, and writes new tokens into them with TensorScatter.

    Inputs past [b, h, p, d] and outputs `present = Concat(past, new)` [b, h, p + s, d] of all layers become
    [b, h, `length`, d] with `present = TensorScatter(past, new, past_length)`; so do past_key, present_key and the like
    of Attention. The graph gets an input `past_length`, int64 []: how many tokens the caches hold. The input `mask`
    [b, p + s] becomes [b, `length`]. What is computed along the cache (masks of padding, causal and sliding ones) is
    computed along all of it, and what depends on its size depends on `past_length`; where something is looked up for
    each token (T5's position bias), it is entry 0 where no token is. Then each Attention, or Softmax of attention that
    is spelled out, masks all from token p + s on with -inf or false, so that the result is the same whatever numbers
    stand there: they must be finite. Every output but the caches is as it was.

    This is the form that TensorRT takes: caches that grow outside of the operator change their shape at every token,
    and past_key is refused. Left alone: graphs where anything but attention reads along the cache.

    **Safety:** tolerance; the same sums, with zeros added (float32: 1e-6 of the largest value).

    Source: ONNX operators TensorScatter-24 and Attention-24.
    """

    after: ClassVar = ("fuse-attention",)
    safety: ClassVar = "tolerance"

    length: int = Field(2048, ge=1, description="How many tokens a cache has room for, prompt and answer together.")
    mask: str = Field(
        "attention_mask",
        description="The input that marks tokens to attend to, in the cache and new, if there is one.",
    )
    past_length: str = Field("past_length", min_length=1, description="The new input's name.")

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        if not growing_caches(graph):
            return result
        problem = raise_opset(graph, OPSET)
        if problem is not None:
            result.near_misses.append(NearMiss(RULE, "", problem))
            return result
        context.infer_shapes(graph)
        try:
            change = _Change(self, graph)
        except NotStaticError as reason:
            name, module = (reason.node.name, module_of(reason.node)) if reason.node is not None else ("", "")
            result.near_misses.append(NearMiss(RULE, name, str(reason), module))
            return result
        detail = f"{len(change.caches)} caches of {self.length} tokens"
        if context.apply(result, RULE, change.caches[0].node, detail):
            change.make()
        return result


class _Change:
    """The change of one graph, checked when this is made: NotStaticError where it cannot be done."""

    def __init__(self, settings: ScatterKvCache, graph: Graph) -> None:
        self.settings, self.graph = settings, graph
        self.caches = growing_caches(graph)
        dims = Dimensions(graph)
        first = self.caches[0]
        past, new = (dims.of(tensor) for tensor in (first.past, first.new))
        if past is None or new is None or len(new) != 4:
            raise NotStaticError(first.node, f"the shape of '{first.new.name}' is not known")
        self.past, self.new = past[AXIS], new[AXIS]
        self.mask = self._mask(dims)
        self.dims = Dimensions(graph) if self.mask is not None else dims
        self.tokens = self._tokens()
        self._check()
        follower = GrowthFollower(graph, self.dims, self.past, self.past + self.new)
        self.follower = follower
        sources = [self.mask] if self.mask is not None else []
        nodes = [cache.node for cache in self.caches]
        try:
            self.growth: Growth = follower.follow(nodes, [cache.past for cache in self.caches], sources)
            for node, index in self.growth.sizes:
                self._sizes(node, index)
            for node, index in (*self.growth.numbers, *((node, 0) for node in self.growth.ranges)):
                self._parts(node, index)
        except NotStaticError:
            self._restore()
            raise

    def _check(self) -> None:
        names = {tensor.name for tensor in (*self.graph.inputs, *self.graph.outputs)}
        if self.settings.past_length in names:
            raise NotStaticError(None, f"the graph has an input '{self.settings.past_length}' already")
        if self.past.number is not None or len(self.past.terms) != 1 or not next(iter(self.past.terms))[0]:
            raise NotStaticError(None, f"'{self.caches[0].past.name}' has room for {self.past} tokens already")
        for cache in self.caches:
            past, new = self.dims.of(cache.past) or (), self.dims.of(cache.new) or ()
            if len(new) != 4 or (past[AXIS], new[AXIS]) != (self.past, self.new):
                raise NotStaticError(cache.node, f"'{cache.past.name}' does not grow as the others do")

    def _mask(self, dims: Dimensions) -> Tensor | None:
        """The input that marks tokens; its last axis is made known to be as long as the cache after the run."""
        found = next((t for t in self.graph.inputs if t.name == self.settings.mask), None)
        shape = dims.of(found) if found is not None else None
        if found is None or not shape or shape[-1].number is not None:
            return None
        self._mask_shape = list(found.shape)
        if shape[-1] != self.past + self.new:
            others = {size for t in self.graph.inputs if t is not found for size in dims.of(t) or ()}
            if shape[-1] in others:
                return None
            found.shape = [*found.shape[:-1], f"{self.past} + {self.new}"]
        return found

    def _restore(self) -> None:
        if self.mask is not None:
            self.mask.shape = self._mask_shape

    def _tokens(self) -> tuple[str, int]:
        pasts = {id(cache.past) for cache in self.caches}
        for tensor in self.graph.inputs:
            for axis, size in enumerate(self.dims.of(tensor) or ()):
                if id(tensor) not in pasts and size == self.new:
                    return tensor.name, axis
        self._restore()
        raise NotStaticError(self.caches[0].node, f"no input has an axis of {self.new} new tokens")

    # What sizes and numbers become

    def _sizes(self, node: Node, index: int) -> list[Dimension]:
        values = self.dims.values(node.inputs[index]) or (None,)
        made = [self.follower.static(v, self.settings.length) if isinstance(v, Dimension) else None for v in values]
        if None in made:
            raise NotStaticError(node, f"{called(node)} makes a size of how full the cache is")
        return [size for size in made if size is not None]

    def _parts(self, node: Node, index: int) -> tuple[int, list[Dimension], int]:
        """a, sizes and c of the number a · past + Σ sizes + c."""
        (value,) = self.dims.values(node.inputs[index]) or (None,)
        factor, offset, sizes = 0, 0, []
        for symbols, count in value.terms if isinstance(value, Dimension) else ():
            if symbols == (self.follower.symbol,):
                factor = count
            elif not symbols:
                offset = count
            elif len(symbols) == 1 and count == 1 and not self.follower.mentions([Dimension.of(symbols[0])]):
                sizes.append(Dimension.of(symbols[0]))
            else:
                raise NotStaticError(node, f"{called(node)} computes with {value} tokens")
        return factor, sizes, offset

    # The change

    def make(self) -> None:
        """Do it."""
        graph, length = self.graph, self.settings.length
        self.fresh: Callable[[str], str] = fresh_names(graph)
        self.placement = Placement(graph, outputs_of_scopes(graph))
        self.past_length = Variable(self.settings.past_length, np.dtype(np.int64), [])
        graph.inputs.append(self.past_length)
        self._made: dict[Any, Tensor] = {}
        self._rewire_sizes()
        self._rewire_numbers()
        for node in self.growth.ranges:
            self._count_from_0(node)
        masked = {id(node): self._masked(node) for node in self.growth.attentions}
        for node in self.growth.attentions:
            read_cache(node, masked[id(node)])
        hidden = self.follower.scores.hidden
        never = -np.inf
        rewire([(node, index, self._filled_in(node.inputs[index], never)) for node, index in hidden])
        rewire([(node, index, self._filled_in(node.inputs[index], 0)) for node, index in self.growth.indices])
        for cache in self.caches:
            self._scatter(cache)
        self.placement.finish()
        for tensor, axes in self.growth.axes.values():
            if tensor.shape is not None:
                size = length + self.follower.scores.further.get(id(tensor), 0)
                tensor.shape = [size if axis in axes else other for axis, other in enumerate(tensor.shape)]
        for cache in self.caches:
            cache.past.shape = [*cache.past.shape[:AXIS], length, *cache.past.shape[AXIS + 1 :]]
        StaticCache(
            length=length,
            past_length=self.settings.past_length,
            mask=self.mask.name if self.mask is not None else None,
            tokens=self.tokens,
            caches={cache.past.name: cache.present.name for cache in self.caches},
        ).write(graph)

    def _rewire_sizes(self) -> None:
        for node, index in self.growth.sizes:
            old = node.inputs[index]
            sizes = tuple(self._sizes(node, index))
            scalar = not (self.dims.of(old) or ())
            key = ("sizes", *sizes, scalar, str(old.dtype))
            rewire([(node, index, self._shared(key, partial(self._size, sizes=sizes, like=old, scalar=scalar)))])

    def _size(self, op: Any, sizes: tuple[Dimension, ...], like: Tensor, scalar: bool) -> Tensor:
        made = shape_vector(op, self.graph, self.dims, sizes, ())
        if scalar:
            made = made.reshape(()) if isinstance(made, np.ndarray) else op.Squeeze(made, axes=[0])
        return self._converted(op, made, like)

    def _rewire_numbers(self) -> None:
        rewire([(node, index, self._number(node, index)) for node, index in self.growth.numbers])

    def _number(self, node: Node, index: int) -> Tensor:
        """The number that depends on how full the cache is, computed with `past_length`."""
        old, parts = node.inputs[index], self._parts(node, index)
        rank = len(self.dims.of(old) or ())
        key = ("number", parts[0], *parts[1], parts[2], rank, str(old.dtype))
        return self._shared(key, lambda op: self._computed(op, *parts, rank, old))

    def _count_from_0(self, node: Node) -> None:
        """`Range(start, start + n)` → `Range(0, n) + start`: its size must not depend on what is computed."""
        old = node.outputs[0]
        start, sizes = self._number(node, 0), tuple(self.dims.of(old) or ())
        op = Builder(self.graph.opset, self.fresh, node.name)
        count = self._size(op, sizes, old, scalar=True)
        made = op.Add(op.Range(np.array(0, old.dtype), count, np.array(1, old.dtype)), start)
        for new in op.nodes:
            metadata(new).update(metadata(node))
        self.placement.after(node, op.nodes)
        self.placement.remove(node)
        made.inputs[0].outputs[0] = old

    def _computed(self, op: Any, factor: int, sizes: list[Dimension], offset: int, rank: int, like: Tensor) -> Tensor:
        """factor · past + Σ sizes + offset, of the type of `like`."""
        made: Any = self.past_length
        if factor != 1:
            made = op.Mul(made, np.array(factor, np.int64))
        for size in sizes:
            made = op.Add(made, op.Squeeze(shape_vector(op, self.graph, self.dims, [size], ()), axes=[0]))
        if offset:
            made = op.Add(made, np.array(offset, np.int64))
        if rank:
            made = op.Unsqueeze(made, axes=list(range(rank)))
        return self._converted(op, made, like)

    def _converted(self, op: Any, made: Any, like: Tensor) -> Tensor:
        if isinstance(made, np.ndarray):
            return Constant(self.fresh("static"), made.astype(like.dtype))
        if like.dtype is not None and like.dtype != np.int64:
            made = op.Cast(made, to=onnx_dtype(like))
        return cast(Tensor, made)

    def _filled(self, causal: bool) -> Tensor:
        """Which tokens of the cache are there: [length], or before each new one: [s, length]."""

        def make(op: Any) -> Any:
            columns = np.arange(self.settings.length, dtype=np.int64)
            rows = shape_vector(op, self.graph, self.dims, [self.new], ())
            if not causal:
                made = op.Less(columns, op.Add(self.past_length, op.Squeeze(rows, axes=[0])))
            else:
                zero, one = np.array(0, np.int64), np.array(1, np.int64)
                order = op.Range(zero, op.Squeeze(rows, axes=[0]), one)
                made = op.LessOrEqual(columns, op.Unsqueeze(op.Add(order, self.past_length), axes=[1]))
            made.dtype = np.dtype(np.bool_)
            return made

        return self._shared(("filled", causal), make)

    def _masked(self, node: Node) -> Tensor:
        """The mask of an Attention, and none of what is not there yet."""
        causal = bool(node.attrs.get("is_causal", 0))
        filled = self._filled(causal)
        mask = node.inputs[3] if len(node.inputs) > 3 and not node.inputs[3].is_empty() else None
        if mask is None and causal:
            return filled
        if mask is None:
            sizes = [self.new, Dimension.of(self.settings.length)]
            return self._shared(
                ("whole", id(filled)), lambda op: op.Expand(filled, shape_vector(op, self.graph, self.dims, sizes, ()))
            )
        if mask.dtype == np.bool_:
            return self._shared((id(mask), causal), lambda op: op.And(mask, filled))
        never = np.asarray(-np.inf, mask.dtype)
        return self._shared((id(mask), causal), lambda op: op.Where(filled, mask, never), mask.dtype)

    def _filled_in(self, values: Tensor, other: float) -> Tensor:
        """Values along the cache, `other` where no token is yet: -inf of scores of attention that is spelled out."""
        made = np.asarray(other, values.dtype)
        return self._shared(
            (id(values), other), lambda op: op.Where(self._filled(causal=False), values, made), values.dtype
        )

    def _shared(self, key: Any, make: Callable[[Any], Any], dtype: Any = None) -> Tensor:
        """What `make` makes, once for each key."""
        if key not in self._made:
            op = Builder(self.graph.opset, self.fresh, "static_cache")
            made = make(op)
            if dtype is not None:
                made.dtype = dtype
            self.placement.early(op.nodes)
            self._made[key] = made
        return self._made[key]

    def _scatter(self, cache: Cache) -> None:
        op = Builder(self.graph.opset, self.fresh, cache.node.name)
        indices = self._shared("indices", self._indices)
        made = op.TensorScatter(cache.past, cache.new, indices, axis=AXIS)
        metadata(op.nodes[0]).update(metadata(cache.node))
        self.placement.early(op.nodes)
        if cache.node.op == "Concat":
            self.placement.remove(cache.node)
        made.inputs[0].outputs[0] = cache.present

    def _indices(self, op: Any) -> Tensor:
        batch = (self.dims.of(self.caches[0].past) or ())[:1]
        return cast(Tensor, op.Expand(self.past_length, shape_vector(op, self.graph, self.dims, batch, ())))
