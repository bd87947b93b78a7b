"""A pass that crashes: what is left beside the output is enough to crash again, and only while the bug is there."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from llmc.compiler.cli import app
from llmc.compiler.digest import sha256
from llmc.compiler.errors import LlmcError
from llmc.compiler.pipeline import PassCrash
from llmc.passes.base import Context, Pass, PassResult
from llmc.passes.graph import Graph
from llmc.passes.precision.quantize_int8 import QuantizeInt8
from llmc.passes.simplify.eliminate_dead import EliminateDead

MODEL = (
    '<ir_version: 10, opset_import: ["": 20]> g (float[N,4] x) => (float[N,4] y) '
    "<float[4,4] w = {0.1,-0.2,0.3,0.4,0.5,-0.6,0.7,0.8,-0.9,0.1,0.2,0.3,-0.4,0.5,0.6,0.7}, "
    "float s = {1.41421356}, float one = {1}, float h = {0.5}, float twice = {2}>"
    "{ p = MatMul(x, w) d = Div(p, s) e = Erf(d) a = Add(e, one) m = Mul(p, a) y = Mul(m, h) }"
)
RECIPE = """\
model: {dimensions: {N: [1, 3, 8]}}
passes:
  - fuse-gelu
  - eliminate-dead
  - quantize-int8: {calibration: {data: DATA, samples: 3}}
target: {kind: onnx}
verify: {budgets: {cosine: 0.5}, pass_budgets: {fuse-gelu: {max_abs: 0.001}}}
"""
Bug = Callable[[Pass, Graph, Context], PassResult]


def raises(_step: Pass, graph: Graph, _context: Context) -> PassResult:
    graph.nodes.clear()
    raise ZeroDivisionError("planted")


def leaves_ruins(_step: Pass, graph: Graph, context: Context) -> PassResult:
    result = PassResult()
    context.apply(result, "Ruin", graph.nodes[0])
    del graph.nodes[0]
    return result


def llmc(*words: object, bug: Bug | None = None, where: type[Pass] = EliminateDead) -> tuple[int, str]:
    """Run a command with the method `run` of one pass replaced: exit code and message."""
    with pytest.MonkeyPatch.context() as patch:
        if bug is not None:
            patch.setattr(where, "run", bug)
        try:
            app([str(word) for word in words], standalone_mode=False)
        except LlmcError as error:
            return error.exit_code, str(error)
    return 0, ""


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """The arguments of a compile of MODEL to `out` in the same folder."""
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "model.onnx")
    (tmp_path / "data").mkdir()
    for number in range(3):
        np.savez(tmp_path / f"data/{number}.npz", x=np.full((2, 4), number + 1, np.float32))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", str(tmp_path / "data")))
    return ["compile", tmp_path / "model.onnx", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out"]


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (raises, "pass 2, eliminate-dead, crashed: ZeroDivisionError: planted."),
        (leaves_ruins, "pass 2, eliminate-dead, crashed: PassError: eliminate-dead left an invalid graph"),
    ],
)
def test_a_crash_leaves_what_repeats_it(bug: Bug, message: str, words: list[object], tmp_path: Path) -> None:
    code, said = llmc(*words, bug=bug)
    assert code == 1
    assert message in said
    assert not (tmp_path / "out").exists()
    repro = tmp_path / "out.failed/repro"
    assert {p.name for p in repro.iterdir()} == {"before.onnx", "inputs", "recipe.yaml", "traceback.txt"}
    assert {n.op_type for n in onnx.load(repro / "before.onnx").graph.node} == {"MatMul", "Gelu"}
    assert "Traceback" in (repro / "traceback.txt").read_text()
    again = shlex.split(said.strip().splitlines()[-1])
    assert again[0] == "llmc"
    code, said_again = llmc(*again[1:], bug=bug)
    assert code == 1
    assert message.replace("pass 2", "pass 1") in said_again
    assert llmc(*again[1:])[0] == 0  # the bug is mended


def test_the_report_of_a_crash_says_how_far_it_came(words: list[object], tmp_path: Path) -> None:
    llmc(*words, bug=raises)
    report = json.loads((tmp_path / "out.failed/report.json").read_text())
    assert report["status"] == "crashed"
    assert [(p["key"], p["status"]) for p in report["passes"]] == [
        ("load", "done"),
        ("fuse-gelu", "done"),
        ("eliminate-dead", "crashed"),
    ]
    assert report["graph"]["nodes"] == {"Gelu": 1, "MatMul": 1}  # before the pass, which had cleared the graph
    manifest = json.loads((tmp_path / "out.failed/manifest.json").read_text())
    assert all(sha256(tmp_path / "out.failed" / name) == digest for name, digest in manifest["files"].items())
    for page in ("report.html", "report.md"):
        assert "planted" in (tmp_path / "out.failed" / page).read_text()


def test_a_pass_that_calibrates_keeps_its_data(words: list[object], tmp_path: Path) -> None:

    def bug(_step: Pass, graph: Graph, context: Context) -> PassResult:
        assert context.activations is not None
        (first, *_) = [values["x"].max() for _, values in context.activations.stream(graph, ["x"])]
        raise ValueError(f"starts with {first}")

    code, said = llmc(*words, bug=bug, where=QuantizeInt8)
    assert code == 1
    assert "starts with 1.0" in said
    for path in (tmp_path / "data").iterdir():
        path.unlink()
    again = shlex.split(said.strip().splitlines()[-1])
    code, said = llmc(*again[1:], bug=bug, where=QuantizeInt8)
    assert (code, "starts with 1.0" in said) == (1, True)


def test_the_limit_of_rewrites_counts_on(words: list[object]) -> None:
    def bug(_step: Pass, graph: Graph, context: Context) -> PassResult:
        allowed = sum(context.apply(PassResult(), "", graph.nodes[0]) for _ in range(9))
        raise ValueError(f"{allowed} were allowed")

    code, said = llmc(*words, "--stop-after-rewrite", 4, bug=bug)
    assert (code, "3 were allowed" in said) == (1, True)  # fuse-gelu took one
    code, said = llmc(*shlex.split(said.strip().splitlines()[-1])[1:], bug=bug)
    assert (code, "3 were allowed" in said) == (1, True)


def test_a_crash_is_told_even_where_its_evidence_cannot_be_kept(words: list[object], tmp_path: Path) -> None:
    (tmp_path / "out.failed").write_text("a file of someone's")
    with pytest.raises(PassCrash, match="planted"):
        llmc(*words, bug=raises)
    assert (tmp_path / "out.failed").read_text() == "a file of someone's"


def test_a_broken_budget_is_repeated_whatever_budgets_later_passes_have(words: list[object], tmp_path: Path) -> None:
    recipe = (tmp_path / "recipe.yaml").read_text()
    budgets = "{fuse-gelu: {max_abs: 0}, eliminate-dead: {max_abs: 1}}"
    (tmp_path / "recipe.yaml").write_text(recipe.replace("{fuse-gelu: {max_abs: 0.001}}", budgets))
    code, said = llmc(*words)
    assert (code, "pass 1, fuse-gelu, broke the budget" in said) == (3, True)
    code, again = llmc(*shlex.split(said.strip().splitlines()[-1])[1:])
    assert (code, again.partition("\n")[0]) == (3, said.partition("\n")[0])


def test_a_process_ends_with_the_code_of_a_bug_and_no_traceback(words: list[object]) -> None:
    script = (
        "from llmc.passes.simplify.eliminate_dead import EliminateDead\n"
        "EliminateDead.run = lambda *_: 1 / 0\n"
        "from llmc.compiler.cli import main\nmain()"
    )
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: pass 2, eliminate-dead, crashed: ZeroDivisionError: division by zero.")
    assert "Traceback" not in done.stderr
