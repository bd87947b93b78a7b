"""The three modes: what is run after which step, and that a budget means the same in each."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from llmc.compiler import pipeline
from llmc.compiler.recipe.sections import VerifySection
from llmc.compiler.session import Session
from llmc.compiler.verification import Verifier
from llmc.compiler.verification.judge import Judge, Verdict
from llmc.passes.base import Context, Ledger, Pass, PassResult
from llmc.passes.graph import Constant, Graph, Node, Variable
from llmc.passes.simplify.eliminate_dead import EliminateDead

CHAIN = (
    "(float[N,4] x) => (float[N,4] y) <float c = {2}, float d = {3}> {"
    "a = Tanh(x) b = Mul(a, c) e = Add(b, d) f = Exp(e) g = Neg(f) h = Abs(g) i = Sqrt(h) y = Identity(i) }"
)


class Scales(Pass):
    """Multiplies what each node of an operator makes by `by`, and claims that this is exact."""

    safety: ClassVar = "exact"
    operator: str = "Exp"
    by: float = 1.0

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        for node in [node for node in graph.nodes if node.op == self.operator]:
            if context.apply(result, "scale", node):
                output = node.outputs[0]
                inner = Variable(f"{output.name}_unscaled", output.dtype, output.shape)
                node.outputs[0] = inner
                factor = Constant(f"{output.name}_by", np.array(self.by, np.float32))
                graph.nodes.insert(graph.nodes.index(node) + 1, Node("Mul", inner.name, {}, [inner, factor], [output]))
        return result


@pytest.fixture
def judged(parse: Any, random_feeds: Any, monkeypatch: Any) -> Any:
    """Run passes under a verify section: their verdicts, and how often the whole graph was run."""

    def judged(passes: list[Pass], text: str = CHAIN, **section: Any) -> tuple[list[Verdict], int]:
        graph = parse(text)
        samples = [random_feeds(graph, seed, 3) for seed in (0, 1)]
        verifier = Verifier(Session(parse(text)).run_each, samples)
        runs = []
        measure = Verifier.measure
        monkeypatch.setattr(Verifier, "measure", lambda self, g: runs.append(g) or measure(self, g))
        judge = Judge(VerifySection.model_validate(section), verifier, len(passes))
        ledger, verdicts = Ledger(), []
        step = pipeline.loaded(graph)
        for index, step_pass in enumerate(passes, start=1):
            step = pipeline.run_pass(step.end, index, step_pass, lambda _: None, ledger)
            verdicts.append(judge.judge(step, step_pass.safety))
            judge.accept(step, verdicts[-1])
        return verdicts, len(runs)

    return judged


RIGHT, WRONG, IDLE = Scales(operator="Neg"), Scales(by=1.5), Scales(operator="Sin")


@pytest.mark.parametrize(
    ("mode", "passes", "verified", "runs"),
    [
        ("full", [RIGHT, IDLE, RIGHT], ["full", "", "full"], 2),
        ("full", [WRONG, IDLE], ["full", ""], 1),
        ("final", [RIGHT, IDLE, RIGHT], ["", "", "full"], 1),
        ("final", [RIGHT, IDLE], ["", "full"], 1),
        ("local", [RIGHT, RIGHT, IDLE], ["local", "local", "full"], 1),
        ("local", [RIGHT, WRONG, IDLE], ["local", "full", ""], 1),
        ("local", [WRONG, RIGHT], ["full", "full"], 2),
        ("local", [IDLE, IDLE], ["", "full"], 1),  # a model that cannot run is found out
    ],
)
def test_what_is_run_when(mode: str, passes: list[Pass], verified: list[str], runs: int, judged: Any) -> None:
    verdicts, found = judged(passes, mode=mode)
    assert [verdict.verified for verdict in verdicts] == verified
    assert found == runs


@pytest.mark.parametrize("mode", ["full", "local", "final"])
def test_a_budget_means_the_same_in_every_mode(mode: str, judged: Any) -> None:
    """y is multiplied by the square root of 1.5."""
    moved = np.sqrt(1.5) - 1
    for limit, breaks in ((moved * 1.01, False), (moved * 0.99, True)):
        verdicts, _ = judged([WRONG], mode=mode, budgets={"relative_l2": float(limit)})
        assert bool(verdicts[0].problems) is breaks


def test_regions_are_named_and_claims_are_checked(judged: Any) -> None:
    (verdict,), _ = judged([WRONG], mode="local")
    (region,) = verdict.regions
    assert (region.nodes, region.replaced) == (["f", "f_unscaled"], ["f"])
    assert region.outputs[0].relative_l2 == pytest.approx(0.5)
    assert verdict.warnings == ["it is exact, and moved 'f' at 'f' by 0.5 (relative L2)"]


def test_a_budget_tighter_than_rounding_is_judged_on_the_whole_graph(judged: Any) -> None:
    """1 + 2^-23 is the least that float32 can tell from 1."""
    least = Scales(by=1 + 2.0**-23)
    assert judged([least, IDLE], mode="local")[0][0].verified == "local"
    assert judged([least, IDLE], mode="local", budgets={"max_abs": 0.0})[0][0].verified == "full"
    assert judged([least, IDLE], mode="local", pass_budgets={"scales": {"cosine": 0.5}})[0][0].verified == "full"


def test_full_runs_nothing_where_only_dead_nodes_went(judged: Any) -> None:
    dead = CHAIN.replace("y = Identity(i)", "y = Identity(i) z = Neg(i)")
    verdicts, runs = judged([RIGHT, EliminateDead()], dead, mode="full")
    assert [verdict.verified for verdict in verdicts] == ["full", "full"]
    assert verdicts[1].numerics == verdicts[0].numerics
    assert runs == 1
