from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from llmc.compiler.blame.replay import Replay
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.pipeline import loaded, run
from llmc.passes.base import Context, Ledger, Need, Pass, PassResult
from llmc.passes.fuse.fuse_gelu import FuseGelu
from llmc.passes.graph import Array, Graph, copy_graph, digest
from llmc.passes.simplify.eliminate_dead import EliminateDead
from llmc.passes.simplify.fold_constants import FoldConstants

TEXT = (
    "(float[N,4] x) => (float[N,4] y) <float s = {1.41421}, float one = {1.0}, float h = {0.5}> {"
    "c = Sqrt(h) r = Mul(x, c) d = Div(r, s) e = Erf(d) a = Add(e, one) m = Mul(r, a) v = Mul(m, h) dead = Relu(x)"
    "D = Div(v, s) E = Erf(D) A = Add(E, one) M = Mul(v, A) y = Mul(M, h) }"
)
PASSES = (FoldConstants(), FuseGelu(), EliminateDead())


class Asks(Pass):
    """Asks for statistics, and does two rewrites that change nothing."""

    safety: ClassVar = "exact"
    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    tensors: list[str] = Field(["x"])

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        assert context.activations is not None
        context.activations.amax(graph, self.tensors, method="minmax", percentile=100, samples=1)
        context.activations.absolute_maximum(graph, self.tensors)
        for node in graph.nodes[:2]:
            context.apply(result, "asks", node)
        return result


class Counted(list[dict[str, Array]]):
    """Samples that count how often they are read."""

    read = 0

    def __iter__(self) -> Iterator[dict[str, Array]]:
        self.read += 1
        return super().__iter__()


def nodes(graph: Graph) -> list[tuple[str, list[str], list[str]]]:
    """A pass that may do no rewrite may still raise the opset: the nodes are what counts."""
    return [(node.op, [t.name for t in node.inputs], [t.name for t in node.outputs]) for node in graph.nodes]


def test_the_graph_after_any_number_is_that_of_a_run_that_stops_there(parse: Any) -> None:
    graph = parse(TEXT)
    replay = Replay(graph, PASSES, lambda _: None)
    assert replay.count == 4
    for number in range(replay.count + 1):
        *_, last = run(loaded(copy_graph(graph)), PASSES, lambda _: None, stop_after_rewrite=number)
        assert nodes(replay.graph_after(number)) == nodes(last.graph)
    assert [(replay.owner(n).index, replay.rewrite(n).number) for n in range(1, 5)] == [(1, 1), (2, 2), (2, 3), (3, 4)]
    assert digest(graph) == digest(parse(TEXT))


def test_passes_before_the_one_in_question_are_not_run_again(parse: Any) -> None:
    begun: list[str] = []
    replay = Replay(parse(TEXT), PASSES, lambda _: None, lambda _, step: begun.append(step.key()))
    replay.graph_after(2)
    replay.graph_after(3)
    assert begun == ["fold-constants", "fuse-gelu", "eliminate-dead"]


def test_a_question_about_the_same_graph_is_asked_once(parse: Any) -> None:
    data = Counted([{"x": np.ones((2, 4), np.float32)}])
    replay = Replay(parse(TEXT), (FoldConstants(), Asks(), Asks(tensors=["y"])), lambda _: SampledActivations(data))
    assert data.read == 4
    for number in (2, 3, 2):
        replay.partial(replay.done[1], number)
    assert data.read == 4
    replay.again(replay.done[2], Ledger())
    assert data.read == 4
