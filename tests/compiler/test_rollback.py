"""A pass that breaks a budget goes on without the rewrites that broke it, and the report says so."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from rich.console import Console

from llmc.compiler import BudgetError, pipeline
from llmc.compiler import compile as run_compile
from llmc.compiler.recipe.sections import VerifySection
from llmc.compiler.report import html, json, markdown, terminal
from llmc.compiler.rollback import Attempt, without_guilty
from llmc.compiler.session import Session
from llmc.compiler.verification import Verifier
from llmc.compiler.verification.judge import Judge
from llmc.passes.base import Context, Ledger, Pass, PassResult
from llmc.passes.fuse.fuse_gelu import FuseGelu
from llmc.passes.graph import Constant, Graph, Node, Variable

LAYERS = 12
DEEP = (
    "(float[N,4] x) => (float[N,4] y) {"
    + " ".join(f"t{i} = Tanh({f't{i - 1}' if i else 'x'})" for i in range(LAYERS))
    + f" y = Identity(t{LAYERS - 1}) }}"
)
MODEL = (
    '<ir_version: 10, opset_import: ["": 20]> g (float[N,4] x) => (float[N,4] y)'
    " <float s = {1.41421356}, float one = {1.0}, float h = {0.5}, float big = {3.0}> {"
    "d = Div(x, s) e = Erf(d) a = Add(e, one) m = Mul(x, a) v = Mul(m, h) w = Mul(v, big)"
    "D = Div(w, s) E = Erf(D) A = Add(E, one) M = Mul(w, A) y = Mul(M, h) }"
)


class Scales(Pass):
    """Multiplies what every Tanh makes by 1, but by 2 after the nodes `wrong`."""

    safety: ClassVar = "exact"
    wrong: tuple[str, ...] = ()

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        for node in [node for node in graph.nodes if node.op == "Tanh"]:
            if context.apply(result, "scale", node):
                output = node.outputs[0]
                node.outputs[0] = inner = Variable(f"{output.name}_unscaled", output.dtype, output.shape)
                factor = Constant(f"{output.name}_by", np.array(2 if node.name in self.wrong else 1, np.float32))
                graph.nodes.insert(graph.nodes.index(node) + 1, Node("Mul", inner.name, {}, [inner, factor], [output]))
        return result


def roll_back(step_pass: Pass, graph: Graph, samples: Any) -> tuple[Attempt, int]:
    reference = Session(graph).run_each
    loaded = pipeline.loaded(graph)
    section = VerifySection.model_validate({"budgets": {"relative_l2": 1e-3}})
    judge = Judge(section, Verifier(reference, samples), 2)
    step = pipeline.run_pass(loaded.end, 1, step_pass, lambda _: None, Ledger())
    verdict = judge.judge(step, "exact")
    assert verdict.problems
    probes = []

    def rerun(stop_after: int | None, refused: Any) -> pipeline.Step:
        probes.append(stop_after)
        return pipeline.run_pass(step.start, 1, step_pass, lambda _: None, Ledger(stop_after, refused))

    return without_guilty(step, verdict, rerun, lambda s: judge.judge(s, "exact"), lambda _: None), len(probes)


@pytest.mark.parametrize("wrong", [["t0"], ["t11"], ["t5"], ["t2", "t3"], ["t1", "t7", "t11"]], ids=str)
def test_just_the_guilty_rewrites_are_left_out(wrong: list[str], parse: Any, random_feeds: Any) -> None:
    graph = parse(DEEP)
    attempt, probes = roll_back(Scales(wrong=tuple(wrong)), graph, [random_feeds(graph)])
    assert [rewrite.node for rewrite in attempt.left_out] == wrong
    assert (attempt.whole, attempt.verdict.problems) == (False, [])
    assert len(attempt.step.result.rewrites) == LAYERS - len(wrong)
    assert probes <= len(wrong) * (np.ceil(np.log2(LAYERS)) + 1)  # a bisection and the run without what it found


def test_a_pass_with_many_guilty_rewrites_is_left_out_as_a_whole(parse: Any, random_feeds: Any) -> None:
    graph = parse(DEEP)
    attempt, _ = roll_back(Scales(wrong=tuple(f"t{i}" for i in range(LAYERS))), graph, [random_feeds(graph)])
    assert (attempt.whole, len(attempt.left_out), attempt.verdict.problems) == (True, LAYERS, [])
    assert [node.op for node in attempt.step.graph.nodes] == ["Tanh"] * LAYERS + ["Identity"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), path)
    return path


@pytest.fixture
def wrong_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """fuse-gelu with a fault: the second Gelu gets the approximation, which is off by 5e-4 at most."""
    rule = type(FuseGelu.rules[0])
    replace = rule.replace

    def faulty(self: Any, op: Any, x: Any) -> Any:
        return op.Gelu(x, approximate="tanh") if x.name == "w" else replace(self, op, x)

    monkeypatch.setattr(rule, "replace", faulty)


RECIPE = """
passes: [fuse-gelu, eliminate-dead]
target: {{kind: onnx}}
verify: {{on_failure: {}, mode: {}, budgets: {{relative_l2: 1.0e-5}}}}
"""


def compiled(on_failure: str, mode: str, model: Path) -> Any:
    recipe = model.with_name("recipe.yaml")
    recipe.write_text(RECIPE.format(on_failure, mode))
    return run_compile(str(model), recipe, model.with_name("out"))


@pytest.mark.usefixtures("wrong_once")
@pytest.mark.parametrize("mode", ["full", "local"])
def test_fail_warn_and_rollback(mode: str, model: Path) -> None:
    with pytest.raises(BudgetError, match=r"pass 1, fuse-gelu, broke the budget: output 'y': relative_l2"):
        compiled("fail", mode, model)
    warned = compiled("warn", mode, model)
    assert (warned.status, warned.graph.nodes) == ("done", {"Gelu": 2, "Mul": 1})
    assert any("relative_l2" in line for line in warned.passes[1].warnings)
    report = compiled("rollback", mode, model)
    step = report.passes[1]
    assert (report.status, step.status, report.graph.nodes["Gelu"]) == ("rolled back", "rolled back", 1)
    (guilty,) = step.left_out
    assert step.reason.startswith(f"left out 1 of 2: 2 ({guilty.rule} at 'y'), because output 'y': relative_l2 is")
    assert [rewrite.number for rewrite in step.rewrites] == [1]


@pytest.mark.usefixtures("wrong_once")
def test_every_rendering_says_so(model: Path) -> None:
    report = compiled("rollback", "local", model)
    console = Console(width=100, record=True, file=io.StringIO())
    terminal.render(report, console)
    said = [console.export_text(), html.render(report), markdown.render(report), json.render(report)]
    for text in said:
        plain = " ".join(text.replace("&#39;", "'").split())
        assert "rolled back" in plain or "rewrites left out" in plain
        assert "left out 1 of 2" in plain
