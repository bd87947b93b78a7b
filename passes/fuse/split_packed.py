"""The pass `split-packed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.graph import (
    Graph,
    Node,
    Tensor,
    fresh_names,
    metadata,
    module_of,
    outputs_of_scopes,
    scopes,
)
from llmc.passes.match import attribute, called
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.rewrite import merged_metadata
from llmc.passes.shapes.dimensions import Dimensions

RULE = "packed"
MOVES = ("Identity", "Squeeze", "Transpose", "Unsqueeze")


class NotPackedError(Exception):
    """The first thing that keeps parts from being a Split."""


class SplitPacked(Pass):
    """Takes a packed tensor apart with one Split, where a graph stacks its parts along an axis and picks each one.

    x [..., n·w], any type: `Gather(Transpose(Reshape(x, [..., n, w]), n first), i, axis=0)` for each i →
    `Split(x, n parts, axis=-1)`, also with Unsqueeze and Squeeze around the Transpose. torch.nn.MultiheadAttention
    takes the queries, keys and values of its one product apart like that.

    **Safety:** exact.

    Source: torch.nn.functional, `_in_projection_packed`; ONNX operators Gather-13 and Split-18.
    """

    after: ClassVar = ("fold-constants",)
    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        context.infer_shapes(graph)
        dims, fresh, given_back = Dimensions(graph), fresh_names(graph), outputs_of_scopes(graph)
        for scope in scopes(graph):
            placement = Placement(scope, given_back)
            for node in [n for n in scope.nodes if n.op == "Reshape" and not n.domain]:
                try:
                    picks = _picks(node, dims, given_back)
                except NotPackedError as reason:
                    result.near_misses.append(NearMiss(RULE, node.name, str(reason), module_of(node)))
                    continue
                if picks and context.apply(result, RULE, node, f"{len(picks)} parts"):
                    _replace(node, picks, graph, fresh, placement)
            placement.finish()
        return result


def _picks(reshape: Node, dims: Dimensions, given_back: set[int]) -> list[Node]:
    """The Gathers that take the parts of a packed tensor, in order; none where it is not taken apart like that."""
    before, after = dims.of(reshape.inputs[0]), dims.of(reshape.outputs[0])
    if before is None or after is None or len(after) != len(before) + 1 or len(before) < 2:
        return []
    count, width = after[-2].number, after[-1].number
    if after[:-2] != before[:-1] or count is None or width is None or before[-1].number != count * width:
        return []
    tensor, axes = reshape.outputs[0], list[int | None](range(len(after)))
    while len(tensor.outputs) == 1 and tensor.outputs[0].op in MOVES and id(tensor) not in given_back:
        node = tensor.outputs[0]
        axes = _moved(node, axes)
        tensor = node.outputs[0]
    users = tensor.outputs
    if not users or any(user.op != "Gather" or user.inputs[0] is not tensor for user in users):
        return []
    if id(tensor) in given_back:
        raise NotPackedError(f"'{tensor.name}', the parts side by side, is an output of the graph")
    picks = {_index(user, axes, dims, count): user for user in users}
    if sorted(picks) != list(range(count)) or len(users) != count:
        raise NotPackedError(f"of the {count} parts not each is taken once")
    return [picks[index] for index in range(count)]


def _moved(node: Node, axes: list[int | None]) -> list[int | None]:
    """Where each axis came from, None for one that was put in."""
    if node.op == "Transpose":
        return [axes[axis] for axis in node.attrs.get("perm") or range(len(axes))[::-1]]
    given = attribute(node, "axes")
    if node.op == "Identity":
        return axes
    if given is None:
        raise NotPackedError(f"{called(node)} computes its axes, or names none")
    if node.op == "Squeeze":
        gone = {axis % len(axes) for axis in given}
        return [source for axis, source in enumerate(axes) if axis not in gone]
    new = {axis % (len(axes) + len(given)) for axis in given}
    rest = iter(axes)
    return [None if axis in new else next(rest) for axis in range(len(axes) + len(given))]


def _index(gather: Node, axes: list[int | None], dims: Dimensions, count: int) -> int:
    """Which part a Gather takes. Raises NotPackedError where what it gives is not that part as it was."""
    rank = len([axis for axis in axes if axis is not None])
    axis = gather.attrs.get("axis", 0) % len(axes)
    if axes[axis] != rank - 2 or [*axes[:axis], *axes[axis + 1 :]] != [*range(rank - 2), rank - 1]:
        raise NotPackedError(f"{called(gather)} takes along another axis, or parts whose axes are in another order")
    index, shape = dims.integers(gather.inputs[1]), dims.of(gather.inputs[1])
    if index is None or shape != () or not -count <= index[0] < count:
        raise NotPackedError(f"{called(gather)} takes not one part that is known")
    return index[0] % count


def _replace(reshape: Node, picks: list[Node], graph: Graph, fresh: Callable[[str], str], placement: Placement) -> None:
    op: Any = Builder(graph.opset, fresh, reshape.name)
    source: Tensor = reshape.inputs[0]
    if graph.opset < 18:
        made = op.Split(source, axis=-1, outputs=len(picks))
    else:
        made = op.Split(source, axis=-1, num_outputs=len(picks), outputs=len(picks))
    for node in op.nodes:
        metadata(node).update(merged_metadata(reshape, [reshape]))
    split, results = made[0].inputs[0], [pick.outputs[0] for pick in picks]
    placement.after(reshape, op.nodes)
    for pick in picks:
        placement.remove(pick)
    for index, result in enumerate(results):
        split.outputs[index] = result
