from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.compiler.artifact import artifact, check_place, is_artifact, sha256, write_manifest
from llmc.compiler.errors import LlmcError


def make(output: Path, text: str = "one") -> None:
    with artifact(output) as folder:
        (folder / "a.txt").write_text(text)
        write_manifest(folder, {"llmc": "0"})


def test_complete_afterwards(tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert is_artifact(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["files"] == {"a.txt": sha256(tmp_path / "out/a.txt")}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def interrupted(output: Path) -> None:
    with artifact(output) as folder:
        (folder / "a.txt").write_text("half")
        raise KeyboardInterrupt


def fill_the_disk(output: Path) -> None:
    with artifact(output) as folder:
        (folder / "full").symlink_to("/dev/full")
        (folder / "full").write_bytes(b"x")


def test_absent_after_a_failure_and_the_old_one_stays(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert (tmp_path / "out/a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_replaces_an_artifact_whole(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    (tmp_path / "out/extra").write_text("of the old one")
    make(tmp_path / "out", "new")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.txt", "manifest.json"]
    assert (tmp_path / "out/a.txt").read_text() == "new"


def test_what_is_no_artifact_needs_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_place(tmp_path / "out", force=False)  # an empty directory holds nothing to lose
    (tmp_path / "out/mine.txt").write_text("precious")
    with pytest.raises(LlmcError, match="is no artifact of llmc; add --force"):
        check_place(tmp_path / "out", force=False)
    check_place(tmp_path / "out", force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(LlmcError, match="is a file; choose another directory"):
        check_place(tmp_path / "file", force=False)


def test_a_read_only_place_is_refused() -> None:
    with pytest.raises(LlmcError, match="/proc is not writable; choose another directory with -o"):
        check_place(Path("/proc/llmc/out"), force=False)


def test_no_space_left_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="no space left"):
        fill_the_disk(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_compile_left_is_cleaned_up(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from llmc.compiler.artifact import artifact\n"
        "with artifact(Path(sys.argv[1])) as f:\n (f / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    make(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_replacement_killed_between_its_two_renames_gives_the_old_one_back(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / "out").rename(tmp_path / f".out.old-{process.pid}")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert (tmp_path / "out/a.txt").read_text() == "old"


def test_another_compile_of_the_same_output_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".out.partial-{os.getppid()}"
    other.mkdir()
    make(tmp_path / "out")
    assert other.is_dir()
