"""The whole of it, on a model of three layers whose second one does not stand INT8: it clips where it should not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from typer.testing import CliRunner

from llmc.compiler.blame import bisect
from llmc.compiler.blame.reproducer import reproduce
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.cli import app
from llmc.compiler.errors import InternalError, LlmcError
from llmc.compiler.planning import plan
from llmc.compiler.recipe import Recipe
from llmc.compiler.verification import verify
from llmc.passes.base import Context, PassResult
from llmc.passes.graph import Graph, copy_graph, from_model, metadata, save_model
from llmc.passes.precision.quantize_int8 import QuantizeInt8

TEXT = """<ir_version: 10, opset_import: ["": 20]> g (float[N,16] x) => (float[N,16] y) {
  a = MatMul(x, w0) b = Relu(a) c = MatMul(b, w1) d = Tanh(c) y = MatMul(d, w2) }"""
RECIPE = """
model: {dimensions: {N: 4}}
passes: [fold-constants, eliminate-identity, quantize-int8, eliminate-dead]
target: {kind: onnx}
verify: {samples: 3, budgets: {relative_l2: 0.05}}
"""
LAYERS = ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """model.onnx, whose second layer has one row of weights that is as large as all others are small; recipe.yaml."""
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for index in range(3):
        weight = rng.standard_normal((16, 16)).astype(np.float32)
        if index == 1:
            weight[0] *= 300  # every channel's scale is made by this row
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"w{index}"))
    graph = from_model(model)
    for node, layer in zip([n for n in graph.nodes if n.op == "MatMul"], LAYERS, strict=True):
        metadata(node)["pkg.torch.onnx.name_scopes"] = repr(["", layer, "matmul"])
    save_model(graph, tmp_path / "model.onnx")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    samples = tmp_path / "samples"
    samples.mkdir()
    for index in range(3):
        x = rng.standard_normal((4, 16)).astype(np.float32)
        np.savez(samples / f"{index}.npz", x=x)
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, [*words], catch_exceptions=False)


def options(place: Path) -> list[str]:
    return ["--recipe", str(place / "recipe.yaml"), "--verify-inputs", str(place / "samples"), "-o", str(place / "out")]


def test_the_command_names_the_layer_and_leaves_what_shows_it(place: Path) -> None:
    done = run("bisect", str(place / "model.onnx"), *options(place), "--json")
    assert done.exit_code == 3
    found = json.loads(done.stdout)
    assert (found["status"], found["guilty"]["key"], found["guilty"]["module"]) == (
        "broken",
        "quantize-int8",
        LAYERS[1],
    )
    assert found["appears"]["tensor"] == "c"
    assert json.loads((place / "out/blame.json").read_text()) == found
    assert {p.name for p in (place / "out").iterdir()} == {"blame.json", "growth.svg", "manifest.json", "reproducer"}
    part = found["reproducer"]
    assert (part["nodes_before"], part["inputs"], part["output"]) == (1, ["b"], "c")
    assert run("reproduce", part["folder"]).exit_code == 3
    shown = run("bisect", str(place / "model.onnx"), *options(place)).stdout
    assert f"Rewrite {found['guilty']['number']} breaks it: QuantizeInt8" in shown
    assert "reproducer" in shown


def test_the_pass_can_do_it_again_on_the_part_alone(place: Path) -> None:
    run("bisect", str(place / "model.onnx"), *options(place))
    again = json.loads((place / "out/reproducer/reproducer.json").read_text())["again"]
    done = subprocess.run(
        [sys.executable, "-m", "llmc.compiler", *again.split()[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "pass 1, quantize-int8, broke the budget" in done.stderr


def test_a_budget_that_holds_leaves_nothing(place: Path) -> None:
    words = [*options(place), "--metric", "cosine", "--at-least", "0.5"]
    done = run("bisect", str(place / "model.onnx"), *words)
    assert done.exit_code == 0
    assert "No rewrite breaks the budget" in done.stdout
    assert not (place / "out").exists()


@pytest.mark.parametrize("partial", [False, True], ids=["in the compile", "in a part of it"])
def test_a_pass_that_crashes_is_told_as_by_compile(partial: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the whole compile, or only where it may not do all of its rewrites: the command crashes the same way."""
    sound = QuantizeInt8.run

    def bug(step: QuantizeInt8, graph: Graph, context: Context) -> PassResult:
        if partial and context.ledger.stop_after is None:
            return sound(step, graph, context)
        raise ZeroDivisionError(f"planted, to stop after {context.ledger.stop_after}")

    monkeypatch.setattr(QuantizeInt8, "run", bug)
    words = ["bisect", str(place / "model.onnx"), *options(place), "--set", "verify.on_failure=warn"]
    told = "quantize-int8, crashed: ZeroDivisionError: planted, to stop after " + (r"\d" if partial else "None")
    with pytest.raises(InternalError, match=f"pass 3, {told}") as first:
        app(words, standalone_mode=False)
    repro = place / "out.failed/repro"
    assert {p.name for p in repro.iterdir()} >= {"before.onnx", "inputs", "recipe.yaml", "traceback.txt"}
    assert json.loads((place / "out.failed/manifest.json").read_text())["status"] == "crashed"
    assert not (place / "out").exists()
    again = shlex.split(str(first.value).splitlines()[-1])[1:]
    line = str(first.value).splitlines()[0].replace("pass 3", "pass 1")  # it is alone in the recipe now
    with pytest.raises(InternalError, match=re.escape(line)):
        app(again, standalone_mode=False)
    monkeypatch.undo()
    app(again, standalone_mode=False)  # the bug is mended


def test_evidence_and_artifacts_bring_their_recipe(place: Path) -> None:
    model = str(place / "model.onnx")
    words = ["--recipe", str(place / "recipe.yaml"), "--verify-inputs", str(place / "samples")]
    failed = subprocess.run(
        [sys.executable, "-m", "llmc.compiler", "compile", model, *words, "-o", str(place / "art")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 3, failed.stderr
    found = run("bisect", str(place / "art.failed"), "-o", str(place / "out"), "--json")
    assert json.loads(found.stdout)["guilty"]["module"] == LAYERS[1]
    loose = ["--set", "verify.budgets={cosine: 0.5}"]
    assert run("compile", model, *words, *loose, "-o", str(place / "art")).exit_code == 0
    words = ["bisect", str(place / "art"), "--metric", "relative_l2", "--at-most", "0.05", "-o", str(place / "out")]
    found = run(*words, "--source", model, "--json")
    assert json.loads(found.stdout)["guilty"]["module"] == LAYERS[1]
    with pytest.raises(LlmcError, match="add --source MODEL"):
        run(*words)
    other = onnx.load(model)
    other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))
    onnx.save(other, place / "other.onnx")
    with pytest.raises(LlmcError, match=r"other.onnx is not what .*art was made of"):
        run(*words, "--source", str(place / "other.onnx"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--metric", "cosine"], "--metric cosine goes with --at-least X"),
        (["--metric", "cosine", "--at-most", "1"], "--metric cosine goes with --at-least X"),
        (["--metric", "max_abs", "--at-least", "1"], "--metric max_abs goes with --at-most X"),
        (["--at-most", "1"], "--at-most: of which metric"),
        (["--metric", "beauty", "--at-least", "1"], "--metric beauty is unknown"),
        (["--source", "x.onnx"], "--source goes with an artifact"),
        (["--set", "verify.budgets={}"], "has no budget to break"),
    ],
)
def test_what_does_not_fit_together_is_refused(words: list[str], reason: str, place: Path) -> None:
    with pytest.raises(LlmcError, match=reason):
        run("bisect", str(place / "model.onnx"), *options(place), *words)
    assert not (place / "out").exists()


def test_a_recipe_is_asked_for(place: Path) -> None:
    with pytest.raises(LlmcError, match="--recipe R"):
        run("bisect", str(place / "model.onnx"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "reproducer.json").unlink(), "is no reproducer"),
        (lambda folder: (folder / "reproducer.json").write_text("{}"), "is no reproducer"),
        (lambda folder: (folder / "inputs/0000.npz").write_bytes(b"PK"), "is no reproducer"),
        (lambda folder: (folder / "before.onnx").unlink(), "before.onnx cannot be read"),
        (lambda folder: shutil.copy(folder / "after.onnx", folder / "before.onnx"), "the files were changed"),
    ],
)
def test_a_damaged_reproducer_is_refused(change: Any, reason: str, place: Path) -> None:
    run("bisect", str(place / "model.onnx"), *options(place))
    change(place / "out/reproducer")
    with pytest.raises(LlmcError, match=reason):
        reproduce(place / "out/reproducer")


def test_sensitivity_is_what_the_pass_does_when_told_to_leave_layers_alone(place: Path) -> None:
    recipe = Recipe.load(place / "recipe.yaml").with_values({"verify.inputs": place / "samples"})
    made = plan(str(place / "model.onnx"), recipe)
    found = bisect(made, place / "out", sensitivity=True)
    (ranked,) = found.sensitivity
    assert ranked.layers[0].module == LAYERS[1]
    assert ranked.enough == 1
    assert ranked.setting == {"exclude": [ranked.layers[0].layer]}

    def truth(**parameters: Any) -> float:
        graph = copy_graph(made.loaded.graph)
        activations = SampledActivations(made.calibration["quantize-int8"])
        QuantizeInt8(**parameters).run(graph, Context(activations=activations))
        (line,) = verify(graph, made.loaded.graph, made.verification)
        assert line.relative_l2 is not None
        return line.relative_l2

    for layer in ranked.layers:
        assert layer.numerics[0].relative_l2 == truth(include=[layer.layer])
    for point in ranked.remaining[:-1]:
        assert point.numerics[0].relative_l2 == truth(exclude=[layer.layer for layer in ranked.layers[: point.kept]])
    assert ranked.remaining[-1].numerics[0].max_abs == 0
    again = bisect(made, place / "out", sensitivity=True)
    assert again.sensitivity == found.sensitivity
