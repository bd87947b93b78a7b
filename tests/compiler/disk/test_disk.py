"""Disks that are too small, or become full: small file systems, mounted for each test."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from llmc.compiler import disk
from llmc.compiler.artifact import check_artifact
from llmc.compiler.cache import place
from llmc.compiler.driver import compile as run_compile
from llmc.compiler.errors import LlmcError
from llmc.passes.graph import load_model, onnx_file

from .conftest import WEIGHTS, Mounted, llmc, recipe, same_models


def fill(root: Path, left: int) -> None:
    """Leave so many bytes of a disk, or none that can be had."""
    with (root / "filler").open("wb", buffering=0) as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, disk.free_bytes(root) - (left or 1 << 20))
        while not left:
            file.write(bytes(4096))


def test_too_small_a_disk_is_said_before_anything_runs(model: Path, mounted: Mounted) -> None:
    root = mounted(16)
    fill(root, WEIGHTS // disk.LEAST - 4096)
    before = sorted(root.iterdir())
    ended = llmc("compile", model, "--recipe", recipe(model, "half"), "-o", root / "out/deep")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {root}/out/deep needs 1.05 MB or more, and its disk has 1.04 MB free:")
    assert len(ended.stderr.splitlines()) == 1
    assert sorted(root.iterdir()) == before
    assert not list((place() / "v1/records").glob("pass/*/*"))


def test_too_small_a_disk_for_what_passes_left_and_the_next_run_goes_on(
    model: Path, mounted: Mounted, tmp_path: Path
) -> None:
    root = mounted(32)
    fill(root, WEIGHTS // 2 - 4096)
    ended = llmc("compile", model, "--recipe", recipe(model, "half"), "-o", root / "out")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {root}/out needs 8.39 MB for its weights, and its disk has 8.38 MB free:")
    assert [path.name for path in root.iterdir()] == ["filler"]
    (root / "filler").unlink()
    report = run_compile(str(model), recipe(model, "half"), root / "out")
    assert "2 convert-fp16" in report.timings.cached
    check_artifact(root / "out")
    run_compile(str(model), recipe(model, "half"), tmp_path / "elsewhere", cached=False)
    assert same_models(root / "out", tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["same", "half"])
def test_a_disk_that_becomes_full_while_the_model_is_written(
    name: str, model: Path, mounted: Mounted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free at the time of the check, another process takes."""
    root = mounted(32)
    fill(root, WEIGHTS // 4)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free_bytes", lambda _place: 1 << 40)
        with pytest.raises(LlmcError, match=f"^no space left on the disk of {root}; free some, or choose another"):
            run_compile(str(model), recipe(model, name), root / "out")
    assert [path.name for path in root.iterdir()] == ["filler"]
    assert list((place() / "v1/sessions").iterdir()) == []
    (root / "filler").unlink()
    assert run_compile(str(model), recipe(model, name), root / "out").timings.cached
    check_artifact(root / "out")
    run_compile(str(model), recipe(model, name), tmp_path / "elsewhere", cached=False)
    assert same_models(root / "out", tmp_path / "elsewhere")


@pytest.mark.parametrize("left", [pytest.param(0, marks=pytest.mark.slow), 3 << 20])
def test_a_full_disk_of_the_cache_costs_the_cache_alone(
    left: int, model: Path, mounted: Mounted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, what was kept by then is sound, and with room the next compile goes on from there."""
    root = mounted(48)
    monkeypatch.setenv("LLMC_CACHE", str(root / "cache"))
    (root / "cache").mkdir()
    fill(root, left)
    words = ("compile", model, "--recipe", recipe(model, "half"), "-o")
    ended = llmc(*words, tmp_path / "first")
    assert ended.returncode == 0
    assert len(ended.stderr.splitlines()) == 1
    assert "No space left on device" in ended.stderr
    check_artifact(tmp_path / "first")
    assert not list(root.glob("cache/v1/sessions/*"))
    (root / "filler").unlink()
    for _ in range(2):
        report = run_compile(str(model), recipe(model, "half"), tmp_path / "second")
        assert same_models(tmp_path / "first", tmp_path / "second")
    assert "2 convert-fp16" in report.timings.cached


def test_the_cache_leaves_the_room_that_the_output_needs(
    model: Path, mounted: Mounted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = mounted(64)
    monkeypatch.setenv("LLMC_CACHE", str(root / "cache"))
    fill(root, WEIGHTS // 2 + (4 << 20))  # either of them fits, both do not
    run_compile(str(model), recipe(model, "half"), root / "out")
    check_artifact(root / "out")
    assert "the output needs what room is left on its disk" in caplog.text


@pytest.mark.parametrize("mounted", ["btrfs", "xfs"], indirect=True)
def test_a_copy_that_shares_its_blocks_needs_no_room(
    model: Path, mounted: Mounted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = mounted(160)
    shutil.copytree(model.parent, root / "source")
    moved = root / "source/model.onnx"
    assert disk.bytes_to_write(load_model(moved), root / "out") == WEIGHTS, "in one file nothing is aligned"
    monkeypatch.setattr(onnx_file, "EXTERNAL_FROM", WEIGHTS)
    assert disk.bytes_to_write(load_model(model), tmp_path / "out") == WEIGHTS
    assert disk.bytes_to_write(load_model(moved), root / "out") == 0
    os.sync()
    free = disk.free_bytes(root)
    run_compile(str(moved), recipe(moved, "same"), root / "out", cached=False)
    assert (root / "out/model.onnx.data").stat().st_size == WEIGHTS
    os.sync()
    assert free - disk.free_bytes(root) < WEIGHTS / 4
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
