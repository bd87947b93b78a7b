"""The pass `fuse-rotary-embedding`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.fuse.attention_match import single
from llmc.passes.fuse.rotary_match import Half, NotRotaryError, RotaryMatcher, Rotation, unsqueezes_heads
from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    fresh_names,
    infer_shapes,
    metadata,
    module_of,
    outputs_of_scopes,
    rewire,
    scopes,
)
from llmc.passes.opset import raise_opset
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.rewrite import merged_metadata
from llmc.passes.shapes.dimension import ONE, Dimension
from llmc.passes.shapes.dimensions import Dimensions
from llmc.passes.shapes.shape_vectors import shape_vector

OPSET = 23


class FuseRotaryEmbedding(Pass):
    """Fuses rotary position embedding to one RotaryEmbedding node.

    x [b, h, s, d], cos and sin [b or 1, 1, s, d] whose halves are equal, float16, bfloat16 or float32:
    `Add(Mul(x, cos), Mul(Concat(Neg(x₂), x₁), sin))` with x₁ and x₂ the halves of x → `RotaryEmbedding(x, cos', sin')`
    with half of the tables, [b, s, d/2]; also `Concat(Sub(Mul(x₁, cos'), Mul(x₂, sin')), Add(Mul(x₁, sin'),
    Mul(x₂, cos')))`. Where heads stand behind the sequence, x [b, s, h, d], it is taken as [b, s, h·d]. Where x₁ and
    x₂ are the even and the odd elements, `interleaved` is 1. Where only the first r of the d elements are rotated and
    the others put back behind them, `rotary_embedding_dim` is r.

    Tables are computed or constant; that their halves are equal must be seen. Those of batch 1 are expanded to the
    batch of x once for the whole model, as the operator wants them; also for RotaryEmbedding nodes that were there.

    **Safety:** tolerance; the same function, rounded in another order (float32: 1e-6 of the largest value).

    Source: ONNX operator RotaryEmbedding-23; Su et al., RoFormer, 2021.
    """

    after: ClassVar = ("fold-constants",)
    safety: ClassVar = "tolerance"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        if not any(node.op in ("Neg", "Sub", "RotaryEmbedding") for scope in scopes(graph) for node in scope.nodes):
            return result
        context.infer_shapes(graph)
        if graph.opset < OPSET and _Fusion(graph, context, result).finds_any():
            problem = raise_opset(graph, OPSET)
            if problem is not None:
                result.near_misses.append(NearMiss("rotary", "", problem))
                return result
            infer_shapes(graph)
        fusion = _Fusion(graph, context, result)
        for scope in scopes(graph):
            fusion.fuse(scope)
        return result


class _Fusion:
    def __init__(self, graph: Graph, context: Context, result: PassResult) -> None:
        self.graph, self.context, self.result = graph, context, result
        self.dims = Dimensions(graph)
        self.given_back = outputs_of_scopes(graph)
        self.fresh: Callable[[str], str] = fresh_names(graph)
        self.matcher = RotaryMatcher(self.dims, self.given_back)

    def finds_any(self) -> bool:
        """Whether there is anything to fuse."""
        return any(self._found(node, report=False) for scope in scopes(self.graph) for node in scope.nodes)

    def fuse(self, scope: Graph) -> None:
        """Fuse every rotation of one scope."""
        placement = Placement(scope, self.given_back)
        tables = _Tables(self.graph, self.dims, placement, self.fresh)
        for node in list(scope.nodes):
            rotation = self._found(node, report=True) if node.outputs else None
            narrow = node.op == "RotaryEmbedding" and not node.domain and self._is_narrow(node)
            if rotation is None and not narrow:
                continue
            rule, at = ("rotary", rotation.root) if rotation is not None else ("rotary-batch", node)
            if not self.context.apply(self.result, rule, at):
                continue
            if rotation is not None:
                self._replace(node, rotation, tables, placement)
            else:
                tables.widen(node)
        placement.finish()

    def _found(self, node: Node, report: bool) -> Rotation | None:
        if node.op not in ("Neg", "Sub") or node.domain:
            return None
        try:
            rotation = self.matcher.at(node)
            self._check(rotation)
        except NotRotaryError as reason:
            if report and node.op == "Neg":
                self.result.near_misses.append(NearMiss("rotary", node.name, str(reason), module_of(node)))
            return None
        return rotation

    def _check(self, rotation: Rotation) -> int:
        """The axis of the heads in x. Raises NotRotaryError where the tables have no shape that the operator takes."""
        shape, table = self.dims.of(rotation.x), self.dims.of(rotation.cos_shape)
        if shape is None or len(shape) != 4:
            raise NotRotaryError(f"'{rotation.x.name}' is not known to have rank 4")
        heads_first = table is not None and table[-2:-1] == (shape[2],) and all(n == ONE for n in table[-3:-2])
        heads_last = table is not None and len(table) == 4 and table[1:3] == (shape[1], ONE)
        if table is None or len(table) > 4 or not (heads_first or heads_last):
            raise NotRotaryError(f"the cosine '{rotation.cos_shape.name}' is not [batch or 1, 1, sequence, size]")
        if len(table) == 4 and table[0] not in (ONE, shape[0]):
            raise NotRotaryError(f"the cosine '{rotation.cos_shape.name}' is not of the batch of '{rotation.x.name}'")
        if rotation.cos_shape.dtype != rotation.x.dtype:
            raise NotRotaryError(f"the cosine is {rotation.cos_shape.dtype}, '{rotation.x.name}' is {rotation.x.dtype}")
        if not heads_first and shape[2].number is None:
            raise NotRotaryError(f"the number of heads of '{rotation.x.name}' is not known")
        return 1 if heads_first else 2

    def _is_narrow(self, node: Node) -> bool:
        """Whether the tables (or positions) of a RotaryEmbedding are of batch 1, and x may be of another."""
        shape = self.dims.of(node.inputs[0])
        table = self.dims.of(node.inputs[3] if len(node.inputs) > 3 else node.inputs[1])
        return shape is not None and table is not None and table[0] == ONE and shape[0] != ONE

    def _replace(self, node: Node, rotation: Rotation, tables: _Tables, placement: Placement) -> None:
        shape, axis = self.dims.of(rotation.x) or (), self._check(rotation)
        cos, sin = (tables.made(half, rotation, shape[0], axis) for half in (rotation.cos, rotation.sin))
        op = Builder(self.graph.opset, self.fresh, rotation.root.name)
        partial, flat = shape[-1].number != rotation.size, axis == 2
        heads = shape[axis].number
        made = op.RotaryEmbedding(
            op.Reshape(rotation.x, np.array([0, 0, -1], dtype=np.int64)) if flat else rotation.x,
            cos,
            sin,
            interleaved=1 if rotation.interleaved else None,
            rotary_embedding_dim=rotation.size if partial else None,
            num_heads=heads if partial or flat else None,
        )
        if flat:
            made = op.Reshape(made, np.array([0, 0, heads, -1], dtype=np.int64))
        for new in op.nodes:
            metadata(new).update(merged_metadata(rotation.root, [rotation.root, node]))
        result = rotation.root.outputs[0]
        placement.after(rotation.root, op.nodes)
        placement.remove(rotation.root)
        made.inputs[0].outputs[0] = result
        self.dims.follow(op.nodes)


class _Tables:
    """The tables of one scope, each made once."""

    def __init__(self, graph: Graph, dims: Dimensions, placement: Placement, fresh: Callable[[str], str]) -> None:
        self.graph, self.dims, self.placement, self.fresh = graph, dims, placement, fresh
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def made(self, half: Half, rotation: Rotation, batch: Dimension, axis: int) -> Tensor:
        """[batch, sequence, size / 2] of half a table."""
        source = half.source if isinstance(half.source, Tensor) else half.source.tobytes()
        key = (source if isinstance(source, bytes) else id(source), *map(id, half.done), batch, axis)
        if key not in self._made:
            op = Builder(self.graph.opset, self.fresh, f"{rotation.cos_shape.name}.half")
            tensor = self._replayed(op, half, len(self.dims.of(rotation.cos_shape) or ()), axis)
            self.dims.follow(op.nodes)
            self.placement.early(op.nodes)
            self._made[key] = self._expanded(tensor, batch, rotation.x)
        return self._made[key]

    def widen(self, node: Node) -> None:
        """Let a RotaryEmbedding have tables, or positions, of the batch of its x."""
        batch = (self.dims.of(node.inputs[0]) or ())[0]
        for index in [3] if len(node.inputs) > 3 else [1, 2]:
            key = ("widened", id(node.inputs[index]), batch)
            if key not in self._made:
                self._made[key] = self._expanded(node.inputs[index], batch, node.inputs[0])
            rewire([(node, index, self._made[key])])

    def _replayed(self, op: Any, half: Half, rank: int, axis: int) -> Tensor:
        """What was done to the whole table, done to one half, without room for heads."""
        tensor: Any = half.source
        done = list(half.done)
        squeezed = bool(done) and unsqueezes_heads(done[0], rank, axis)
        for node in reversed(done[1:] if squeezed else done):
            inputs = [tensor if index == _table_input(node) else given for index, given in enumerate(node.inputs)]
            tensor = getattr(op, node.op)(*inputs, **node.attrs)
            tensor.dtype = node.outputs[0].dtype
        if rank == 2:
            return cast(Tensor, op.Unsqueeze(tensor, axes=[0]))
        if rank == 4 and not squeezed:
            return cast(Tensor, op.Squeeze(tensor, axes=[axis]))
        return tensor if isinstance(tensor, Tensor) else Constant(self.fresh("rotary_table"), tensor)

    def _expanded(self, tensor: Tensor, batch: Dimension, near: Tensor) -> Tensor:
        """The tensor [1, …] for a batch."""
        shape = self.dims.of(tensor) or ()
        if shape[0] == batch:
            return tensor
        op = Builder(self.graph.opset, self.fresh, tensor.name)
        sizes = (batch, *(ONE,) * (len(shape) - 1))
        made: Tensor = op.Expand(tensor, shape_vector(op, self.graph, self.dims, sizes, (near,)))
        made.dtype = tensor.dtype
        self.dims.follow(op.nodes)
        self.placement.early(op.nodes)
        return made


def _table_input(node: Node) -> int:
    """Which input of a node the table is."""
    return 1 if node.op == "Mul" and single(node.inputs[0]) is not None else 0
