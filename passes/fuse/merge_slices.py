"""The pass `merge-slices`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.graph import Graph, Node, fresh_names, metadata, module_of, outputs_of_scopes, scopes
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.rewrite import merged_metadata
from llmc.passes.shapes.dimensions import Dimensions

RULE = "slices"


@dataclass(frozen=True)
class Piece:
    """A Slice that takes `start` to `end` of one axis."""

    node: Node
    axis: int
    width: int
    """Of the whole axis."""
    start: int
    end: int


class MergeSlices(Pass):
    """Takes a tensor apart with one Split where several Slices do, which together take all of it.

    x [..., n, ...], any type: `Slice(x, 0, a)`, `Slice(x, a, b)`, …, `Slice(x, z, n)` of one axis of known size, each
    element once → `Split(x, [a, b - a, …, n - z])`. torch's older exporter writes `chunk`, and the slices that Phi-3
    cuts its packed queries, keys and values into, like that.

    **Safety:** exact.

    Source: ONNX operators Slice-13 and Split-13.
    """

    after: ClassVar = ("fold-constants", "fuse-rotary-embedding")
    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        context.infer_shapes(graph)
        dims, given_back, fresh = Dimensions(graph), outputs_of_scopes(graph), fresh_names(graph)
        for scope in scopes(graph):
            placement = Placement(scope, given_back)
            for pieces in _groups(scope, dims):
                first = pieces[0].node
                if (problem := _problem(pieces)) is not None:
                    result.near_misses.append(NearMiss(RULE, first.name, problem, module_of(first)))
                elif context.apply(result, RULE, first, " + ".join(str(p.end - p.start) for p in pieces)):
                    _replace(pieces, placement, Builder(graph.opset, fresh, first.name))
            placement.finish()
        return result


def _groups(scope: Graph, dims: Dimensions) -> Iterable[list[Piece]]:
    """Two pieces or more of one axis of one tensor, from the first element on."""
    found: dict[tuple[int, int], list[Piece]] = defaultdict(list)
    for node in scope.nodes:
        piece = _piece(node, dims)
        if piece is not None:
            found[id(node.inputs[0]), piece.axis].append(piece)
    return [sorted(pieces, key=lambda piece: piece.start) for pieces in found.values() if len(pieces) > 1]


def _piece(node: Node, dims: Dimensions) -> Piece | None:
    """What a Slice takes; None where it is of several axes or in steps, or where that is not known."""
    if node.op != "Slice" or node.domain or len(node.inputs) < 3 or (shape := dims.of(node.inputs[0])) is None:
        return None
    told = list[int]()
    for index, default in ((1, []), (2, []), (3, [0]), (4, [1])):
        given = index < len(node.inputs) and not node.inputs[index].is_empty()
        values = dims.integers(node.inputs[index]) if given else default
        if values is None or len(values) != 1:
            return None
        told.extend(values)
    start, end, axis, step = told
    axis %= len(shape)
    width = shape[axis].number
    if step != 1 or width is None:
        return None
    first, last, _ = slice(start, end).indices(width)
    return Piece(node, axis, width, first, last)


def _problem(pieces: list[Piece]) -> str | None:
    """Why pieces, in order, are not all of their axis, each element once."""
    end = 0
    for piece in pieces:
        if piece.start != end or piece.end <= piece.start:
            return f"it takes {piece.start} to {piece.end} of axis {piece.axis}, where others before it end at {end}"
        end = piece.end
    return None if end == pieces[0].width else f"the {pieces[0].width} of axis {pieces[0].axis} are taken up to {end}"


def _replace(pieces: list[Piece], placement: Placement, op: Any) -> None:
    x, nodes = pieces[0].node.inputs[0], [piece.node for piece in pieces]
    made = op.Split(x, split=[p.end - p.start for p in pieces], axis=pieces[0].axis, outputs=len(pieces))
    split = made[0].inputs[0]
    for node in op.nodes:
        metadata(node).update(merged_metadata(nodes[0], nodes))
    placement.early(op.nodes)
    results = [node.outputs[0] for node in nodes]
    for node in nodes:
        placement.remove(node)
    for index, result in enumerate(results):
        split.outputs[index] = result
