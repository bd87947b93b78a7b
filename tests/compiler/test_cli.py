"""The command line as users meet it: in a process of its own, by exit code, message, and what is left on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import yaml

from llmc.compiler.digest import sha256

MODEL = (
    '<ir_version: 10, opset_import: ["": 17]> g (float[N,4] x) => (float[N,4] y) '
    "<float[4,4] w = {0.1,-0.2,0.3,0.4,0.5,-0.6,0.7,0.8,-0.9,0.1,0.2,0.3,-0.4,0.5,0.6,0.7}, "
    "float s = {1.41421356}, float one = {1}, float h = {0.5}>"
    "{ p = MatMul(x, w) d = Div(p, s) e = Erf(d) a = Add(e, one) m = Mul(p, a) y = Mul(m, h) }"
)
RECIPE = (
    "model: {dimensions: {N: [1, 3, 8]}}\npasses: [fold-constants, fuse-gelu, eliminate-dead]\ntarget: {kind: onnx}\n"
)


def llmc(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmc.compiler", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), path)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_compile_leaves_a_complete_artifact(model: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = llmc("compile", model, "--recipe", recipe, "-o", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # not a terminal: no progress
    files = {"model.onnx", "report.json", "report.html", "report.md", "recipe.yaml", "manifest.json"}
    assert {p.name for p in out.iterdir()} == files
    report = json.loads((out / "report.json").read_text())
    assert report["graph"]["nodes"] == {"Gelu": 1, "MatMul": 1}
    assert [p["key"] for p in report["passes"]] == ["load", "fold-constants", "fuse-gelu", "eliminate-dead"]
    (region,) = report["passes"][2]["regions"]
    (numerics,) = region["outputs"]
    assert 0 < numerics["max_abs"] < 1e-6  # it was measured, and is what rounding gives on values of order 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) == files - {"manifest.json"}


def test_a_second_compile_gives_the_same_bytes(model: Path, recipe: Path, tmp_path: Path) -> None:
    reports = []
    for name in ("one", "two"):
        assert llmc("compile", model, "--recipe", recipe, "-o", tmp_path / name).returncode == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        report.pop("timings")
        reports.append(json.dumps(report))
    assert reports[0] == reports[1]
    assert (tmp_path / "one/model.onnx").read_bytes() == (tmp_path / "two/model.onnx").read_bytes()


def test_the_resolved_recipe_compiles_to_the_same(model: Path, recipe: Path, tmp_path: Path) -> None:
    assert llmc("compile", model, "--recipe", recipe, "-o", tmp_path / "one").returncode == 0
    again = llmc("compile", model, "--recipe", tmp_path / "one/recipe.yaml", "-o", tmp_path / "two")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "one/model.onnx").read_bytes() == (tmp_path / "two/model.onnx").read_bytes()


def test_a_broken_budget_stops_with_evidence_that_repeats_it(model: Path, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE + "verify: {budgets: {max_abs: 0}}\n", encoding="utf-8")
    out = tmp_path / "out"
    done = llmc("compile", model, "--recipe", recipe, "-o", out)
    assert done.returncode == 3
    assert "pass 2, fuse-gelu, broke the budget: output 'y': max_abs is" in done.stderr
    assert not out.exists()
    repro = tmp_path / "out.failed/repro"
    assert {p.name for p in repro.iterdir()} == {"loaded.onnx", "before.onnx", "after.onnx", "inputs", "recipe.yaml"}
    assert "Erf" in [n.op_type for n in onnx.load(repro / "before.onnx").graph.node]
    assert "Gelu" in [n.op_type for n in onnx.load(repro / "after.onnx").graph.node]
    command = done.stderr.strip().splitlines()[-1].split()
    assert command[:2] == ["llmc", "compile"]
    again = llmc(*command[1:])
    assert again.returncode == 3
    assert again.stderr.split("The graphs")[0] == done.stderr.split("The graphs")[0]


def test_a_budget_may_warn_instead(model: Path, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE + "verify: {budgets: {max_abs: 0}, on_failure: warn}\n", encoding="utf-8")
    done = llmc("compile", model, "--recipe", recipe, "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "the budget allows at most 0" in done.stdout.replace("\n", " ").replace("  ", " ")


def test_dry_run_builds_nothing(model: Path, recipe: Path, tmp_path: Path) -> None:
    done = llmc("compile", model, "--recipe", recipe, "-o", tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [next(iter(p)) for p in plan["passes"]] == ["fold-constants", "fuse-gelu", "eliminate-dead"]
    assert plan["profiles"] == [{"N": [1, 3, 8]}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "recipe.yaml"]


def test_the_passes_can_be_watched(model: Path, recipe: Path, tmp_path: Path) -> None:
    words = ["--print-changed", "--time-passes", "--dump-passes", tmp_path / "dump", "--json"]
    done = llmc("compile", model, "--recipe", recipe, "-o", tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert "2 fuse-gelu: 5 removed, 1 added" in lines
    dumped = ["00-load.onnx", "01-fold-constants.onnx", "02-fuse-gelu.onnx", "03-eliminate-dead.onnx"]
    assert sorted(path.name for path in (tmp_path / "dump").glob("*.onnx")) == dumped
    timings = json.loads(done.stdout)["timings"]  # and nothing else was printed there
    assert timings["steps"].keys() > {"load", "2 fuse-gelu", "build"}
    assert timings["verification"].keys() == {"2 fuse-gelu", "3 eliminate-dead"}  # the only rewrite, and the end
    seconds = {line.split()[-2]: line.split()[-1] for line in lines if line.startswith("build")}
    assert list(seconds) == [f"{timings['steps']['build']:.3f}"]


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_inputs_and_outputs_of_16_bits_are_verified_with_the_rest(half: str, model: Path, tmp_path: Path) -> None:
    key = {"float16": "convert-fp16", "bfloat16": "convert-bf16"}[half]
    recipe = write(
        tmp_path / "half.yaml", f"passes: [{{{key}: {{inputs_outputs: convert}}}}]\ntarget: {{kind: onnx}}\n"
    )
    done = llmc("compile", model, "--recipe", recipe, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [t["dtype"] for t in (*report["graph"]["inputs"], *report["graph"]["outputs"])] == [half, half]
    (numerics,) = report["passes"][1]["numerics"]
    # values of order 1, rounded once at each of eight steps: 2^-8 for the wider steps of bfloat16
    assert 0 < numerics["relative_l2"] < 8 * 2.0**-8


def test_settings_change_the_recipe(model: Path, recipe: Path, tmp_path: Path) -> None:
    words = ("--set", "passes.fold-constants.growth_limit=5", "--set", "model.dimensions.N=[2,2,2]")
    assert llmc("compile", model, "--recipe", recipe, "-o", tmp_path / "out", *words).returncode == 0
    resolved = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    assert resolved["passes"][0]["fold-constants"]["growth_limit"] == 5
    assert resolved["model"]["dimensions"]["N"] == {"min": 2, "opt": 2, "max": 2}


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def bad_inputs(tmp: Path, model: Path, recipe: Path) -> dict[str, tuple[list[object], str]]:
    """What is wrong → the words after `llmc compile`, and a part of the message."""
    good = ["--recipe", recipe, "-o", tmp / "out"]
    samples = tmp / "samples"
    samples.mkdir()
    np.savez(samples / "a.npz", x=np.zeros((9, 5), np.float32))
    big = tmp / "big"
    big.mkdir()
    np.savez(big / "a.npz", x=np.zeros((9, 4), np.float32), z=np.zeros(1, np.float32))
    long = '<ir_version: 10, opset_import: ["": 17]> g (float[T,4] x, float[1] z) => (float[T,4] y) { y = Add(x, z) }'
    onnx.save(onnx.parser.parse_model(long), tmp / "long.onnx")
    bad_op = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 17, "my.ops": 1]> '
        "g (float[N,4] x) => (float[N,4] y) { y = my.ops.Magic(x) }"
    )
    onnx.save(bad_op, tmp / "magic.onnx")
    return {
        "missing file": ([tmp / "none.onnx", *good], "none.onnx' does not exist"),
        "truncated": ([write(tmp / "half.onnx", model.read_bytes()[:90]), *good], "half.onnx"),
        "not an ONNX": ([write(tmp / "text.onnx", "<html>no</html>"), *good], "text.onnx"),
        "unknown recipe": ([model, "--recipe", "fp61"], "did you mean 'fp16'?"),
        "missing recipe": ([model, "--recipe", tmp / "no.yaml"], "no.yaml"),
        "unknown pass": (
            [model, "--recipe", write(tmp / "a.yaml", "passes: [fuse-gleu]")],
            "a.yaml:1: passes.1: no pass is called 'fuse-gleu'; did you mean 'fuse-gelu'?",
        ),
        "misspelt key": ([model, "--recipe", write(tmp / "b.yaml", "passes: []\nverfy: {}")], "did you mean 'verify'?"),
        "wrong type": (
            [model, "--recipe", write(tmp / "c.yaml", "passes: []\nverify: {samples: many}")],
            "verify.samples",
        ),
        "bad setting": ([model, *good, "--set", "target.knd=onnx"], "did you mean 'kind'?"),
        "wrong shape of data": ([model, *good, "--verify-inputs", samples], "axis 1 must be 4"),
        "data outside the profile": (
            [tmp / "long.onnx", *good, "--set", "model.dimensions={T: [1, 4, 8]}", "--verify-inputs", big],
            "sample 1: 'T' is 9, the profile goes from 1 to 8; change model.dimensions in the recipe",
        ),
        "nothing calibrates": ([model, *good, "--calibration", samples], "has no pass that calibrates"),
        "no such data": ([model, *good, "--verify-inputs", tmp / "nowhere"], "nowhere"),
        "unknown operator": ([tmp / "magic.onnx", *good], "my.ops"),
        "output is a file": ([model, "--recipe", recipe, "-o", model], "is a file"),
        "output is not ours": ([model, "--recipe", recipe, "-o", samples], "--force"),
        "read-only output": ([model, "--recipe", recipe, "-o", "/proc/x/out"], "not writable"),
        "unknown target": ([model, *good, "--target", "tensorrt-rxt"], "did you mean 'tensorrt-rtx'?"),
    }


BAD = [
    "missing file", "truncated", "not an ONNX", "unknown recipe", "missing recipe", "unknown pass", "misspelt key",
    "wrong type", "bad setting", "wrong shape of data", "data outside the profile", "nothing calibrates",
    "no such data", "unknown operator", "output is a file", "output is not ours", "read-only output", "unknown target",
]  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_message(case: str, tmp_path: Path, model: Path, recipe: Path) -> None:
    cases = bad_inputs(tmp_path, model, recipe)
    assert sorted(cases) == sorted(BAD)
    words, message = cases[case]
    before = {str(p) for p in tmp_path.rglob("*")}
    done = llmc("compile", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert {str(p) for p in tmp_path.rglob("*")} == before


UNBUILDABLE = {
    "unsupported operator": (
        "(float[N,4] x) => (int64[2,M] y) { y = NonZero(x) }",
        [],
        "NonZero",
    ),
    "float32 on SM75": (
        "(float[N,4] x) => (float[N,4] y) <float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> { y = MatMul(x, w) }",
        ["--set", "target.compute_capabilities=[75]"],
        "75",
    ),
    "unknown compute capability": (
        "(float[N,4] x) => (float[N,4] y) { y = Relu(x) }",
        ["--set", "target.compute_capabilities=[77]"],
        "77",
    ),
}


@pytest.mark.parametrize("case", UNBUILDABLE)
def test_what_the_target_cannot_build(case: str, recipe: Path, tmp_path: Path) -> None:
    text, words, named = UNBUILDABLE[case]
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 17]> g {text}')
    onnx.save(model, tmp_path / "model.onnx")
    before = {p.name for p in tmp_path.iterdir()}
    command = ["compile", tmp_path / "model.onnx", "--recipe", recipe, "-o", tmp_path / "out"]
    done = llmc(*command, "--target", "tensorrt-rtx", *words)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("delay", [0.2, 0.6, 0.9, 1.2, 1.5, 1.8, 2.1, 2.4])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(number: int, delay: float, model: Path, recipe: Path, tmp_path: Path) -> None:
    """At moments spread over the whole run: import, load, passes, verification, writing."""
    before = {p.name for p in tmp_path.iterdir()}
    command = [sys.executable, "-m", "llmc.compiler", "compile", model, "--recipe", recipe, "-o", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    assert process.returncode in (0, 130, -number)  # -number: before Python has set up its handler
    left = {p.name for p in tmp_path.iterdir()} - before
    if process.returncode == 0 or left:  # complete or absent: the report may still be printed when the signal comes
        assert left == {"out"}
        files = json.loads((tmp_path / "out/manifest.json").read_text())["files"]
        assert all(sha256(tmp_path / "out" / name) == digest for name, digest in files.items())


def test_help_starts_at_once_and_documents_the_exit_codes() -> None:
    done = llmc("--help", env={**os.environ, "COLUMNS": "200"})
    assert (
        "0 done, 1 a bug of llmc, 2 bad input, 3 budget broken, 4 the target cannot build it, 130 interrupted"
        in done.stdout
    )


@pytest.mark.parametrize("words", [["passes"], ["passes", "fuse-gelu"], ["doctor"], ["recipe", "list"]])
def test_json_for_scripts(words: list[str]) -> None:
    done = llmc(*words, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    plain = llmc(*words)
    assert plain.returncode == 0
    assert plain.stdout


def test_inspect_an_artifact(model: Path, recipe: Path, tmp_path: Path) -> None:
    assert llmc("compile", model, "--recipe", recipe, "-o", tmp_path / "out").returncode == 0
    assert "fuse-gelu" in llmc("inspect", tmp_path / "out").stdout
    shown = json.loads(llmc("inspect", model, "--json").stdout)
    assert shown["graph"]["nodes"]["Erf"] == 1
