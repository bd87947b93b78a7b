"""Compiles that are killed (SIGKILL) at any moment: the next one goes on, and what it makes is the same.

A compile runs in a process of its own, forked from one that has imported everything: starting takes no time, and each
moment of it is a moment of the compile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.artifact import check_artifact
from llmc.compiler.cache import place
from llmc.compiler.targets import availability

from .conftest import content, timings

FORKS = """
import json, os, signal, sys, time
from pathlib import Path
import onnxruntime
import llmc.compiler.driver as driver
import llmc.compiler.report.html, llmc.compiler.report.markdown, llmc.compiler.report.json
import llmc.compiler.targets.onnxruntime, llmc.compiler.targets.tensorrt

model, recipe = sys.argv[1:]
names = {signal.SIGKILL: "killed"}

def start(output, renames):
    child = os.fork()
    if child:
        return child
    left = [renames]
    rename = Path.rename
    replace = Path.replace
    def counted(real):
        def call(*words):
            if left[0] is not None:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            return real(*words)
        return call
    Path.rename, Path.replace = counted(rename), counted(replace)
    try:
        driver.compile(model, recipe, Path(output), force=True)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

for line in sys.stdin:
    output, seconds, renames = json.loads(line)
    begun = time.perf_counter()
    child = start(output, renames)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - begun]), flush=True)
"""
Forked = Callable[..., tuple[int, float]]
"""Compiles to an output, killed after so many seconds or before a rename of that number: exit status, and seconds."""


def forked(model: Path) -> tuple[subprocess.Popen[str], Forked]:
    words = [sys.executable, "-c", FORKS, str(model), str(model.with_name("recipe.yaml"))]
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def compiled(output: Path, seconds: float | None = None, renames: int | None = None) -> tuple[int, float]:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([str(output), seconds, renames]) + "\n")
        server.stdin.flush()
        status, spent = json.loads(server.stdout.readline())
        return status, spent

    return server, compiled


def empty_cache() -> None:
    for path in place().rglob("*"):
        if path.is_file():
            path.unlink()


def check_after_kill(folder: Path, compiled: Forked, expected: dict[str, Any]) -> None:
    """Complete or absent; and then the next compile leaves the artifact, and nothing else."""
    output = folder / "out"
    if output.exists():
        check_artifact(output)
        assert content(output) == expected
    assert compiled(output) == (0, pytest.approx(0, abs=600))
    check_artifact(output)
    assert content(output) == expected
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert list((place() / "v1/sessions").iterdir()) == []


def moments(model: Path, folder: Path, kills: int) -> int:
    """Kill as many compiles at random moments, each with an empty cache; how many of them had begun to fill it."""
    server, compiled = forked(model)
    with server:
        assert compiled(folder / "out")[0] == 0
        expected = content(folder / "out")
        empty_cache()
        duration = compiled(folder / "out")[1]
        rng = np.random.default_rng(0)
        resumed = killed = 0
        while killed < kills:
            empty_cache()
            for path in folder.glob("out/*"):
                path.unlink()
            for path in folder.glob("out"):
                path.rmdir()
            status, _ = compiled(folder / "out", seconds=rng.uniform(0, duration))
            killed += status == -9
            check_after_kill(folder, compiled, expected)
            resumed += bool(timings(folder / "out")["cached"])
        assert server.stdin is not None
        server.stdin.close()
    return resumed


def test_killed_at_random_moments(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    moments(model, folder, 3)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_killed_at_fifty_random_moments(target: str, model: Path, tmp_path: Path) -> None:
    if any(entry.kind == target and entry.missing for entry in availability()):
        pytest.skip(f"{target} cannot build here")
    recipe = model.with_name("recipe.yaml")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("kind: onnx", f"kind: {target}"), encoding="utf-8")
    folder = tmp_path / "outputs"
    folder.mkdir()
    assert moments(model, folder, 50) >= 5  # the rest was killed before the first pass had ended


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_file_takes_its_name(every: int, model: Path, tmp_path: Path) -> None:
    """These are the moments at which something is half done; the same artifact stands in the place before."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    server, compiled = forked(model)
    with server:
        assert compiled(folder / "out")[0] == 0
        expected = content(folder / "out")
        seen = 0
        for renames in range(0, 1000, every):
            empty_cache()
            status, _ = compiled(folder / "out", renames=renames)
            check_after_kill(folder, compiled, expected)
            if status == 0:
                break
            assert status == -9
            seen += 1
        assert seen * every > 20
        assert server.stdin is not None
        server.stdin.close()


def test_a_killed_compile_goes_on_from_the_last_pass_that_it_finished(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    server, compiled = forked(model)
    with server:
        found = []
        for renames in (0, 8, 24):  # the files of quantize-int8's statistics lie between the last two
            empty_cache()
            assert compiled(folder / "out", renames=renames)[0] == -9
            finished = len(list((place() / "v1/records/pass").glob("*/*")))
            assert compiled(folder / "out")[0] == 0
            found.append(len([step for step in timings(folder / "out")["cached"] if step != "build"]))
            assert found[-1] == finished
        assert found[0] == 0 < found[1] < found[2]
        assert server.stdin is not None
        server.stdin.close()


def test_two_compiles_at_the_same_time(model: Path, tmp_path: Path) -> None:
    """Of the same recipe over one cache: into two places, and into the same one."""
    outputs = [tmp_path / name for name in ("one", "other", "same", "same")]
    servers = [forked(model)[0] for _ in outputs]
    for server, output in zip(servers, outputs, strict=True):
        assert server.stdin is not None
        server.stdin.write(json.dumps([str(output), None, None]) + "\n")
        server.stdin.close()
    for server in servers:
        with server:
            assert server.stdout is not None
            assert json.loads(server.stdout.read())[0] == 0
    for output in outputs:
        check_artifact(output)
        assert content(output) == content(outputs[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "other", "same"]


def test_a_compile_beside_a_running_one_leaves_its_files_alone(model: Path, tmp_path: Path) -> None:
    server, _ = forked(model)
    other, compiled = forked(model)
    with server, other:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([str(tmp_path / "out"), None, None]) + "\n")
        server.stdin.flush()
        time.sleep(0.1)
        for _ in range(3):
            assert compiled(tmp_path / "out")[0] == 0
        assert json.loads(server.stdout.readline())[0] == 0
        for process in (server, other):
            assert process.stdin is not None
            process.stdin.close()
    check_artifact(tmp_path / "out")
