from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from typer.testing import CliRunner

from llmc.compiler.cli import app
from llmc.compiler.digest import sha256
from llmc.compiler.errors import LlmcError
from llmc.compiler.lock import Lock, differences
from llmc.compiler.recipe.source import parse

RECIPE = """
model: {dimensions: {batch: [1, 2, 4]}}
passes: [fuse-gelu, quantize-int8]
target: {kind: onnx}
verify: {samples: 2}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, its data and a recipe, to work in."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model.onnx", 1.0)
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "samples").mkdir()
    write_sample(tmp_path, 1.0)
    return tmp_path


def write_model(path: Path, factor: float) -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[batch,4] x) => (float[batch,4] y) {y = MatMul(x, w)}'
    model = onnx.parser.parse_model(text)
    values = factor * np.arange(16, dtype=np.float32).reshape(4, 4)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    onnx.save(model, path)


def write_sample(project: Path, value: float) -> None:
    np.savez(project / "samples/0.npz", x=np.full((2, 4), value, np.float32))


def llmc(*words: str) -> str:
    """Compile in the working directory; the error, or '' where there was none."""
    command = ["compile", "model.onnx", "--recipe", "recipe.yaml", "-o", "out", "--verify-inputs", "samples"]
    done = CliRunner().invoke(app, [*command, *words])
    assert done.exception is None or isinstance(done.exception, LlmcError), done.exception
    return str(done.exception or "")


def entry(project: Path) -> Any:
    return parse((project / "llmc.lock").read_text(encoding="utf-8"), "llmc.lock").value["recipes"]["recipe.yaml"][
        "model.onnx"
    ]


def test_a_lock_has_what_went_in_and_what_came_out(project: Path) -> None:
    assert not llmc()
    assert not (project / "llmc.lock").exists()  # nobody asked for one
    assert not llmc("--lock")
    locked = entry(project)
    assert locked["source"] == {"name": "model.onnx", "sha256": sha256(project / "model.onnx")}
    assert locked["recipe"]["passes"][0] == "fuse-gelu"
    assert locked["recipe"]["verify"]["inputs"] == "samples"  # by name: a lock is the same on every machine
    assert locked["verification"] == {"name": "samples", "sha256": sha256(project / "samples/0.npz")}
    assert locked["versions"]["onnx"] == onnx.__version__
    made = ("calibration.json", "model.onnx")
    assert locked["outputs"] == {name: sha256(project / "out" / name) for name in made}
    written = (project / "llmc.lock").read_bytes()
    assert not llmc("--lock", "--no-cache")
    assert (project / "llmc.lock").read_bytes() == written
    assert not llmc("--locked")


def test_what_differs_is_refused_key_by_key_and_nothing_is_touched(project: Path) -> None:
    assert not llmc("--lock")
    before = {path: path.read_bytes() for path in (project / "out").iterdir()}
    lock, old = (project / "llmc.lock").read_bytes(), entry(project)
    write_model(project / "model.onnx", 2.0)
    write_sample(project, 2.0)
    error = llmc("--locked", "--set", "verify.budgets.max_abs=9")
    lines = error.splitlines()
    assert lines[0] == "llmc.lock locks recipe.yaml of model.onnx to something else:"
    assert lines[-1] == "compile without --locked to accept the change"
    assert [line.strip() for line in lines[1:-1]] == [
        f"source.sha256: locked {old['source']['sha256']}, found {sha256(project / 'model.onnx')}",
        "recipe.verify.budgets.max_abs: locked None, found 9.0",
        f"verification.sha256: locked {old['verification']['sha256']}, found {sha256(project / 'samples/0.npz')}",
    ]
    assert {path: path.read_bytes() for path in (project / "out").iterdir()} == before
    assert (project / "llmc.lock").read_bytes() == lock
    assert not llmc()  # accepted, and kept
    assert entry(project)["source"]["sha256"] == sha256(project / "model.onnx")
    assert not llmc("--locked")


def test_an_output_that_differs_is_refused_before_it_takes_its_place(project: Path) -> None:
    assert not llmc("--lock")
    digest = entry(project)["outputs"]["model.onnx"]
    path = project / "llmc.lock"
    path.write_text(path.read_text(encoding="utf-8").replace(digest, "f" * 64), encoding="utf-8")
    manifest = (project / "out/manifest.json").stat().st_mtime_ns
    error = llmc("--locked")
    assert f"outputs.model.onnx: locked {'f' * 64}, found {digest}" in error
    assert (project / "out/manifest.json").stat().st_mtime_ns == manifest
    assert sorted(p.name for p in project.iterdir()) == ["llmc.lock", "model.onnx", "out", "recipe.yaml", "samples"]


@pytest.mark.usefixtures("project")
def test_what_has_no_entry_is_refused_with_what_to_do() -> None:
    error = llmc("--locked")
    assert "llmc.lock has no entry for recipe.yaml of model.onnx: compile with --lock to make one" in error
    error = llmc("--lock", "--stop-after-rewrite", "1")
    assert "leave out --lock and --locked" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", r"llmc.lock:\d+: not YAML"),
        ("recipe: x", "is no lock file of llmc"),
        ("version: 2\nrecipes: {}", "is of version 2; this llmc reads version 1"),
    ],
)
def test_a_damaged_lock_file_is_one_clear_message(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "llmc.lock").write_text(text, encoding="utf-8")
    with pytest.raises(LlmcError, match=message):
        Lock(tmp_path / "llmc.lock", "r.yaml", "m.onnx", refuses=True).check({})


def test_entries_of_other_recipes_and_models_stay(tmp_path: Path) -> None:
    places = [(recipe, model) for recipe in ("b.yaml", "a.yaml") for model in ("y.onnx", "x.onnx")]
    for number, (recipe, model) in enumerate(places):
        assert Lock(tmp_path / "llmc.lock", recipe, model).write({"n": number}) == [
            f"n: locked nothing, found {number}"
        ]
    text = (tmp_path / "llmc.lock").read_text(encoding="utf-8")
    assert parse(text, "").value["recipes"] == {
        "a.yaml": {"x.onnx": {"n": 3}, "y.onnx": {"n": 2}},
        "b.yaml": {"x.onnx": {"n": 1}, "y.onnx": {"n": 0}},
    }
    assert [line.strip() for line in text.splitlines() if line.endswith(".onnx:")] == ["x.onnx:", "y.onnx:"] * 2
    assert Lock(tmp_path / "llmc.lock", "a.yaml", "x.onnx").write({"n": 3}) == []
    assert [path.name for path in tmp_path.iterdir()] == ["llmc.lock"]


def test_many_processes_write_one_lock_file(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from llmc.compiler.lock import Lock\n"
        "for n in range(10): Lock(Path(sys.argv[1]), sys.argv[2], f'{n}.onnx').write({'n': n})"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "llmc.lock")]
    running = [subprocess.Popen([*words, name]) for name in ("a.yaml", "b.yaml", "c.yaml")]
    assert [process.wait() for process in running] == [0, 0, 0]
    recipes = parse((tmp_path / "llmc.lock").read_text(encoding="utf-8"), "").value["recipes"]
    assert {name: len(entries) for name, entries in recipes.items()} == {"a.yaml": 10, "b.yaml": 10, "c.yaml": 10}


def test_where_a_lock_stands_and_what_a_model_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("project/models", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
        write_model(tmp_path / place / "m.onnx", 1.0)
    recipe = str(tmp_path / "project/r.yaml")
    assert Lock.of(recipe, "project/models/m.onnx") == Lock(tmp_path / "project/llmc.lock", "r.yaml", "models/m.onnx")
    assert Lock.of(recipe, "elsewhere/m.onnx").source == "m.onnx"
    assert Lock.of(recipe, "owner/name@v1").source == "owner/name@v1"
    assert Lock.of("fp16", "elsewhere/m.onnx") == Lock(tmp_path / "llmc.lock", "fp16", "elsewhere/m.onnx")
    shipped = Path(__file__).parents[2] / "configs/fp16.yaml"
    assert Lock.of(os.path.relpath(shipped), "owner/name").path == tmp_path / "llmc.lock"


def test_differences_name_every_value_once() -> None:
    locked = {"a": {"b": [1, {"c": None}]}, "gone": [], "same": 1}
    found = {"a": {"b": [1, {"c": 2.5}, 3]}, "same": 1, "new": {"d": "x"}}
    assert differences(locked, found) == [
        "a.b.2.c: locked None, found 2.5",
        "gone: locked [], found nothing",
        "a.b.3: locked nothing, found 3",
        "new.d: locked nothing, found x",
    ]
