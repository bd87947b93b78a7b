from __future__ import annotations

from typing import Any, ClassVar

import pytest

from llmc.compiler import pipeline
from llmc.passes.base import Context, LlmcError, Pass, PassResult, Skip
from llmc.passes.fuse.fuse_gelu import FuseGelu
from llmc.passes.graph import Graph, digest, from_structure
from llmc.passes.simplify.eliminate_dead import EliminateDead

TWO_GELUS = (
    "(float[N,4] x) => (float[N,4] y) <float s = {1.41421}, float one = {1.0}, float h = {0.5}> {"
    "d = Div(x, s) e = Erf(d) a = Add(e, one) m = Mul(x, a) v = Mul(m, h) dead = Relu(x)"
    "D = Div(v, s) E = Erf(D) A = Add(E, one) M = Mul(v, A) y = Mul(M, h) }"
)


class Breaks(Pass):
    """Leaves an invalid graph: a node whose input nothing makes."""

    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        context.apply(result, "Breaks", graph.nodes[-1])
        del graph.nodes[0]
        return result


class Declines(Pass):
    """Never applies."""

    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:  # noqa: ARG002
        raise Skip(f"nothing for it in {len(graph.nodes)} nodes")


class Raises(Pass):
    """Has a bug, half way through."""

    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:  # noqa: ARG002
        graph.nodes.clear()
        raise ZeroDivisionError


class Refuses(Pass):
    """Does not take its input."""

    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:  # noqa: ARG002
        raise LlmcError("give it more")


def test_one_step_a_pass_in_recipe_order(parse: Any) -> None:
    graph = parse(TWO_GELUS)
    steps = list(pipeline.run(pipeline.loaded(graph), [FuseGelu(), EliminateDead()], lambda _: None))
    assert [(s.index, s.key) for s in steps] == [(1, "fuse-gelu"), (2, "eliminate-dead")]
    assert [r.number for s in steps for r in s.result.rewrites] == [1, 2, 3]
    assert steps[0].start.statistics.operators["Erf"] == 2
    assert [n.op for n in steps[-1].graph.nodes] == ["Gelu", "Gelu"]


def test_the_graph_before_a_step_is_kept_as_it_was(parse: Any) -> None:
    graph = parse(TWO_GELUS)
    (step,) = pipeline.run(pipeline.loaded(graph), [FuseGelu()], lambda _: None)
    assert [n.op for n in from_structure(step.before).nodes].count("Erf") == 2


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_a_run_stops_after_any_rewrite(last: int, parse: Any) -> None:
    steps = list(
        pipeline.run(
            pipeline.loaded(parse(TWO_GELUS)), [FuseGelu(), EliminateDead()], lambda _: None, stop_after_rewrite=last
        )
    )
    assert [r.number for s in steps for r in s.result.rewrites] == list(range(1, last + 1))


def test_a_pass_that_does_not_apply_says_why(parse: Any) -> None:
    (step,) = pipeline.run(pipeline.loaded(parse(TWO_GELUS)), [Declines()], lambda _: None)
    assert step.skipped == "nothing for it in 11 nodes"


def test_an_invalid_graph_is_caught_and_the_pass_named(parse: Any) -> None:
    with pytest.raises(pipeline.PassCrash, match="pass 1, breaks, crashed: PassError: breaks left an invalid graph"):
        list(pipeline.run(pipeline.loaded(parse(TWO_GELUS)), [Breaks()], lambda _: None))


def test_a_crash_has_the_graph_before_the_pass_and_the_cause(parse: Any) -> None:
    with pytest.raises(pipeline.PassCrash) as crash:
        list(pipeline.run(pipeline.loaded(parse(TWO_GELUS)), [FuseGelu(), Raises()], lambda _: None))
    assert isinstance(crash.value.__cause__, ZeroDivisionError)
    step = crash.value.step
    assert (step.index, step.key, step.rewrites_before) == (2, "raises", 2)
    assert [n.op for n in from_structure(step.before).nodes] == ["Gelu", "Relu", "Gelu"]


def test_bad_input_is_no_crash(parse: Any) -> None:
    with pytest.raises(LlmcError, match="give it more"):
        list(pipeline.run(pipeline.loaded(parse(TWO_GELUS)), [Refuses()], lambda _: None))


def test_the_load_is_step_0(parse: Any) -> None:
    graph = parse(TWO_GELUS)
    step = pipeline.loaded(graph)
    assert (step.index, step.key, step.label) == (0, "load", "load")
    assert digest(from_structure(step.before)) == digest(step.graph)
