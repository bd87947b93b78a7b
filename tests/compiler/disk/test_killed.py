"""Compiles of a model with external data that are killed (SIGKILL) at random moments, with links and without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmc.compiler.artifact import check_artifact
from llmc.compiler.cache import place
from llmc.compiler.digest import sha256
from llmc.compiler.driver import compile as run_compile

from .conftest import recipe, same_models, write_model

FORKED = """
import os, sys, time
from pathlib import Path
import onnxruntime
import llmc.compiler.driver as driver
import llmc.compiler.report.html, llmc.compiler.report.markdown, llmc.compiler.report.json
import llmc.compiler.targets.onnxruntime

print("ready", flush=True)
sys.stdin.readline()
driver.compile(sys.argv[1], sys.argv[2], Path(sys.argv[3]), force=True)
"""


def started(model: Path, name: str, output: Path) -> subprocess.Popen[str]:
    """A compile in a process of its own, from the moment at which it has imported everything."""
    words = [sys.executable, "-c", FORKED, str(model), str(recipe(model, name)), str(output)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    return process


def kill_at_random(model: Path, name: str, folder: Path, kills: int) -> None:
    """After each kill the place is empty or whole; the next compile gives the same bytes, and leaves nothing else."""
    output, expected = folder / "out", folder.with_name("expected")
    source = sha256(model.with_name("model.onnx.data"))
    run_compile(str(model), recipe(model, name), expected, cached=False)
    begun = time.perf_counter()
    run_compile(str(model), recipe(model, name), output)
    seconds = time.perf_counter() - begun
    rng = np.random.default_rng(0)
    for _ in range(kills):
        for path in (*output.glob("*"), *place().rglob("*")):
            if path.is_file():
                path.unlink()
        output.rmdir() if output.is_dir() else None
        process = started(model, name, output)
        time.sleep(rng.uniform(0, seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode in (0, -9)
        if output.exists():
            check_artifact(output)
        run_compile(str(model), recipe(model, name), output)
        check_artifact(output)
        assert same_models(output, expected)
        assert [path.name for path in folder.iterdir()] == ["out"]
        assert list((place() / "v1/sessions").iterdir()) == []
    assert sha256(model.with_name("model.onnx.data")) == source


@pytest.mark.parametrize("name", ["half", "linked"])
def test_killed_at_random_moments(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    kill_at_random(model, name, tmp_path / "outputs", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half", "linked"])
def test_a_large_model_killed_at_ten_random_moments(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "source", side=2048, layers=36)  # 604 MB, and 302 MB: external data both
    (tmp_path / "outputs").mkdir()
    kill_at_random(model, name, tmp_path / "outputs", 10)
