"""The pass `quantize-kv-cache`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
from pydantic import Field

from llmc.passes.base import Activations, Context, LlmcError, Measured, NearMiss, Need, Pass, PassResult, Safety, Skip
from llmc.passes.cache.caches import SCATTER, Cache, growing_caches, read_cache, static_caches
from llmc.passes.cache.int8_cache import Int8Cache
from llmc.passes.cache.static_cache import AXIS
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Tensor,
    Variable,
    fresh_names,
    metadata,
    module_of,
    outputs_of_scopes,
    rewire,
)
from llmc.passes.match import called
from llmc.passes.opset import raise_opset
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.precision.calibration import Calibration
from llmc.passes.precision.levels import INT8
from llmc.passes.precision.scales import rounded_up

OPSET = 19
"""From which on QuantizeLinear takes float16."""
RULE = "cache"
FLOATS = (np.float32, np.float16)
LEAST = 2.0**-10
"""Of a channel's range, beside the widest of the tensor: float16 still holds all of its digits."""


class QuantizeKvCache(Pass):
    """Keeps the cache of keys and values in int8: a quarter of float32's bytes, half of float16's.

    Inputs past [b, h, p, d] and outputs present = Concat(past, new) [b, h, p + s, d], float32 or float16 →
    present = Concat(past, QuantizeLinear(new)), int8 all three, and whoever read present reads
    DequantizeLinear(present). Attention with past_key and past_value becomes these nodes and an Attention without;
    where it was causal, a mask says so. Of a static cache (stands behind scatter-kv-cache), TensorScatter, which
    TensorRT has in no integer type, becomes ScatterElements. New tokens see one another as later ones will see them:
    quantized.

    Scales come from calibration data, symmetric, amax / 127. Values have one a head (axis 1). Keys have one a head and
    channel, for some channels of keys are wider than others in every token: QuantizeLinear is given new / m, m
    [1, h, 1, d] being each channel's range in parts of the widest, and Attention the queries · m, so that nothing is
    multiplied along the cache (where anything but Attention reads the keys, they are multiplied themselves). The model
    of tests/assets loses 0.01 % of perplexity by it, and 0.03 % with one scale a head (docs/perplexity.md).

    **Safety:** lossy. Rounding moves each number by at most half a scale; beyond the calibrated range it clips.

    Source: ONNX operators QuantizeLinear-19, DequantizeLinear-19, ScatterElements-18; Liu et al., "KIVI" (2024), and
    Hooper et al., "KVQuant" (2024), for keys by channel.
    """

    after: ClassVar[tuple[str, ...]] = ("fuse-attention", "scatter-kv-cache")
    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    real_caches: ClassVar[bool] = True
    safety: ClassVar[Safety] = "lossy"

    keys: Literal["channel", "head"] = Field(
        "channel", description="What has a scale of its own: each channel of a head, or each head, with no Div and Mul."
    )
    calibration: Calibration = Field(Calibration(), description="Where the ranges of keys and values come from.")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError without calibration data, and for keys or values that are not finite."""
        result = PassResult()
        if not (growing_caches(graph) or static_caches(graph)):
            raise Skip("no cache goes into the graph and comes out of it longer")
        if context.activations is None:
            raise LlmcError(f"{self.key()} needs calibration data: give some with --calibration DATA")
        problem = raise_opset(graph, OPSET)
        if problem is not None:
            result.near_misses.append(NearMiss(RULE, "", problem))
            return result
        context.infer_shapes(graph)
        layers = []
        for layer in _layers(graph):
            reason = next(filter(None, map(_unfit, layer)), None)
            if reason is None:
                layers.append(layer)
            else:
                node = layer[0].node
                result.near_misses.append(NearMiss(RULE, node.name, reason, module_of(node)))
        names = [cache.present.name for layer in layers for cache in layer]
        ranges = _ranges(context.activations, graph, names, self.calibration.samples)
        editor = _Editor(graph)
        for layer in layers:
            plans = [_plan(cache, ranges[cache.present.name], self.keys) for cache in layer]
            if context.apply(result, RULE, layer[0].node, "; ".join(plan.detail for plan in plans)):
                editor.quantize(plans)
                result.scales.activations |= {plan.cache.past.name: float(plan.scale.max()) for plan in plans}
        editor.finish()
        return result


def _layers(graph: Graph) -> list[list[Cache]]:
    """The caches of each node: both of an Attention's, which change together."""
    found: dict[int, list[Cache]] = {}
    for cache in (*growing_caches(graph), *static_caches(graph)):
        found.setdefault(id(cache.node), []).append(cache)
    return list(found.values())


def _unfit(cache: Cache) -> str | None:
    """Why a cache cannot be int8; None where it can."""
    node, past = cache.node, cache.past
    if past.dtype not in FLOATS:
        return f"the cache '{past.name}' is {past.dtype}, not float32 or float16"
    if not all(isinstance(past.shape[axis], int) for axis in (1, 3)):
        return f"number and size of the heads of '{past.name}' are not known"
    if len(cache.new.shape or ()) != 4:
        return f"'{cache.new.name}' is not known to be [batch, heads, tokens, size]"
    other = next((n for n in past.outputs if n is not node and not (n.op == "Shape" and not n.domain)), None)
    if other is not None:
        return f"the cache '{past.name}' goes to {called(other)}, too"
    if sum(tensor is past for tensor in node.inputs) > 1:
        return f"{called(node)} reads the cache '{past.name}' twice"
    if node.op == SCATTER and node.attrs.get("axis", -2) not in (AXIS, AXIS - 4):
        return f"{called(node)} writes along axis {node.attrs['axis']}, not along the tokens"
    if node.op == SCATTER and node.attrs.get("mode", "linear") != "linear":
        return f"{called(node)} begins again at the first token where its cache is full"
    if node.op == "Attention" and len(node.inputs[0].shape or ()) != 4:
        return f"{called(node)} is not known to take [batch, heads, tokens, size]"
    if node.op == "Attention" and (any(not t.is_empty() for t in node.inputs[6:]) or len(node.outputs) > 3):
        return f"{called(node)} has lengths of its own, or gives back its scores"
    return None


def _ranges(activations: Activations, graph: Graph, tensors: Sequence[str], samples: int) -> dict[str, Array]:
    """The largest magnitudes in each of the caches [b, h, tokens, d], those of earlier tokens too: float32 [h, d]."""

    def measure(names: Sequence[str]) -> dict[str, Measured]:
        found: dict[str, Array] = {}
        for number, values in activations.stream(graph, names, samples):
            for name, value in values.items():
                if not np.isfinite(value).all():
                    raise LlmcError(f"calibration: the cache '{name}' is NaN or infinite on sample {number}")
                tokens = (0, 2) if value.ndim == 4 else 0  # without padding it is [tokens, h, d]
                amax = np.abs(value).max(axis=tokens, initial=0).astype(np.float32)
                found[name] = np.maximum(found[name], amax) if name in found else amax
        return {name: {"amax": amax} for name, amax in found.items()}

    known = activations.recall(graph, __name__, dict.fromkeys(tensors, "amax"), samples, measure)
    return {name: measured["amax"] for name, measured in known.items()}


@dataclass(frozen=True)
class _Plan:
    """How one cache is quantized."""

    cache: Cache
    scale: Array
    """What one level of Q and DQ stands for: [], or [h] along axis 1."""
    parts: Array | None
    """m: what is divided before and multiplied behind, [h, d]; None: nothing is."""

    @property
    def levels(self) -> Array:
        """What one level of the cache stands for: float32 [h, 1 or d]."""
        if self.parts is None:
            return self.scale.astype(np.float32)[:, None]
        return cast(Array, self.scale.astype(np.float32) * self.parts.astype(np.float32))

    @property
    def detail(self) -> str:
        """For the report."""
        past = self.cache.past
        size = past.shape[1] * past.shape[3]
        by = "head" if self.parts is None else "head and channel"
        return f"'{past.name}' {size * past.dtype.itemsize} → {size} bytes a token, a scale for each {by}"


def _plan(cache: Cache, amax: Array, keys: str) -> _Plan:
    dtype = cache.past.dtype
    if keys != "channel" or not _is_key(cache):
        return _Plan(cache, INT8.scales(amax.max(axis=1), dtype), None)
    widest = amax.max(initial=0)
    parts = rounded_up(np.maximum(amax / (widest or 1), LEAST), dtype) if widest else np.ones_like(amax, dtype)
    return _Plan(cache, INT8.scales(widest, dtype), np.where(amax > 0, parts, dtype.type(1)))


def _is_key(cache: Cache) -> bool:
    """Whether Attention reads it as its keys and nothing else, or it is called so."""
    places = [(node, index) for node, index in _reads(cache.present) if node.op == "Attention" and not node.domain]
    if cache.node.op == "Attention":
        return cache.new is cache.node.inputs[1] and cache.present is cache.node.outputs[1]
    return {index for _, index in places} == {1} if places else cache.past.name.endswith("key")


def _reads(tensor: Tensor) -> Iterator[tuple[Node, int]]:
    """The nodes that read a tensor, and where."""
    for node in {id(node): node for node in tensor.outputs}.values():
        yield from ((node, index) for index, read in enumerate(node.inputs) if read is tensor)


class _Editor:
    """Writes int8 caches into a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.fresh = fresh_names(graph)
        self.placement = Placement(graph, outputs_of_scopes(graph))
        self._made: dict[Any, Tensor] = {}

    def quantize(self, plans: Sequence[_Plan]) -> None:
        node = plans[0].cache.node
        if node.op == "Attention":
            read_cache(node, self._mask(plans[0].cache))
        for plan in plans:
            self._store(plan)
        Int8Cache(
            caches={plan.cache.past.name: plan.cache.present.name for plan in plans},
            scales={plan.cache.past.name: plan.levels.tolist() for plan in plans},
        ).write(self.graph)

    def finish(self) -> None:
        self.placement.finish()

    def _store(self, plan: _Plan) -> None:
        """Let the cache hold levels, and its readers read what they stand for."""
        cache, dtype = plan.cache, plan.cache.new.dtype
        op = self._builder(cache.node)
        scale = Constant(self.fresh(f"{cache.past.name}_scale"), plan.scale)
        zero = Constant(self.fresh(f"{cache.past.name}_zero_point"), np.zeros(plan.scale.shape, np.int8))
        axis = 1 if plan.scale.ndim else None
        new = cache.new
        if plan.parts is not None:
            new = _typed(op.Div(new, plan.parts[None, :, None, :]), dtype, cache.new.shape)
        levels = _typed(op.QuantizeLinear(new, scale, zero, axis=axis), np.int8, cache.new.shape)
        readers = [(node, index) for node, index in _reads(cache.present) if node.op != "Shape"]
        self._append(cache, op, levels)
        cache.past.dtype = cache.present.dtype = np.dtype(np.int8)
        back = self._builder(cache.node)
        made = _typed(back.DequantizeLinear(cache.present, scale, zero, axis=axis), dtype, cache.present.shape)
        if plan.parts is not None:
            made = self._multiplied(plan, back, made, readers)
        rewire([(node, index, made) for node, index in readers])
        self._place(cache.node, back.nodes)

    def _append(self, cache: Cache, op: Any, levels: Tensor) -> None:
        """present from past and the levels of what is new."""
        node = cache.node
        if node.op == "Concat":
            rewire([(node, 1, levels)])
            self._place(node, op.nodes)
            return
        if node.op == SCATTER:
            made = op.ScatterElements(cache.past, self._indices(cache), levels, axis=AXIS)
            self.placement.remove(node)
        else:
            made = op.Concat(cache.past, levels, axis=AXIS)
        made.inputs[0].outputs[0] = cache.present
        self._place(node, op.nodes)

    def _multiplied(self, plan: _Plan, op: Any, keys: Tensor, readers: Sequence[tuple[Node, int]]) -> Tensor:
        """Let the queries be multiplied by m where Attention alone reads the keys; else the keys."""
        parts = cast(Array, plan.parts)
        attentions = [node for node, index in readers if node.op == "Attention" and index == 1]
        heads = [_heads(node.inputs[0]) for node in attentions]
        if len(attentions) < len(readers) or any(not count or count % len(parts) for count in heads):
            return _typed(op.Mul(keys, parts[None, :, None, :]), keys.dtype, keys.shape)
        for node, count in zip(attentions, heads, strict=True):
            queries, builder = node.inputs[0], self._builder(node)
            repeated = parts.repeat(count // len(parts), axis=0)[None, :, None, :]
            rewire([(node, 0, _typed(builder.Mul(queries, repeated), queries.dtype, queries.shape))])
            self._place(node, builder.nodes)
        return keys

    def _indices(self, cache: Cache) -> Tensor:
        """Where ScatterElements writes what TensorScatter writes: the token of each element, int64 [b, h, s, d]."""
        first = cache.node.inputs[2] if len(cache.node.inputs) > 2 else Variable.empty()

        def make(op: Any) -> Any:
            made = op.Unsqueeze(self._range(op, cache.new, None), axes=[1])
            if not first.is_empty():
                made = op.Add(op.Unsqueeze(first, axes=[1, 2, 3]), made)
            return op.Expand(made, op.Shape(cache.new))

        return self._shared(("indices", first.name, *map(str, cache.new.shape)), make)

    def _mask(self, cache: Cache) -> Tensor | None:
        """What an Attention that kept its cache itself is masked with; None: as it is."""
        node = cache.node
        if not node.attrs.get("is_causal", 0):
            return None
        mask = node.inputs[3] if len(node.inputs) > 3 else Variable.empty()
        sizes = (str(cache.past.shape[AXIS]), str(cache.new.shape[AXIS]))

        def seen(op: Any) -> Any:
            """[s, p + s]: whether a new token sees a token."""
            past = op.Squeeze(op.Shape(cache.past, start=AXIS, end=AXIS + 1), axes=[0])
            rows = op.Add(self._range(op, cache.new, None), past)
            columns = self._range(op, cache.new, past)
            return _typed(op.LessOrEqual(columns, op.Unsqueeze(rows, axes=[1])), np.bool_, None)

        causal = self._shared(("causal", *sizes), seen)
        if mask.is_empty():
            return causal
        if mask.dtype == np.bool_:
            return self._shared(("and", mask.name, *sizes), lambda op: op.And(mask, causal))
        never = np.asarray(-np.inf, mask.dtype)
        made = self._shared(("where", mask.name, *sizes), lambda op: op.Where(causal, mask, never))
        made.dtype = mask.dtype
        return made

    def _range(self, op: Any, new: Tensor, past: Tensor | None) -> Tensor:
        """0, 1, … up to the number of new tokens, or of those before them too."""
        count = op.Squeeze(op.Shape(new, start=AXIS, end=AXIS + 1), axes=[0])
        end = count if past is None else op.Add(count, past)
        return cast(Tensor, op.Range(np.array(0, np.int64), end, np.array(1, np.int64)))

    def _shared(self, key: Any, make: Callable[[Any], Any]) -> Tensor:
        """What `make` makes, once for each key."""
        if key not in self._made:
            op = Builder(self.graph.opset, self.fresh, "int8_cache")
            self._made[key] = make(op)
            self.placement.early(op.nodes)
        return self._made[key]

    def _builder(self, node: Node) -> Any:
        return Builder(self.graph.opset, self.fresh, node.name)

    def _place(self, node: Node, nodes: Sequence[Node]) -> None:
        for made in nodes:
            metadata(made).update(metadata(node))
        self.placement.early(nodes)


def _heads(queries: Tensor) -> int:
    """Of [batch, heads, tokens, size]; 0 where that is not known."""
    shape = queries.shape
    return shape[1] if shape is not None and len(shape) == 4 and isinstance(shape[1], int) else 0


def _typed(tensor: Any, dtype: Any, shape: Any) -> Tensor:
    tensor.dtype, tensor.shape = np.dtype(dtype), shape
    return cast(Tensor, tensor)
