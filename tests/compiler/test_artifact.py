from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.compiler.artifact import artifact, check_artifact, check_place, is_artifact, write_manifest
from llmc.compiler.digest import sha256
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


def test_any_byte_that_changes_in_any_file_is_noticed(tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert check_artifact(tmp_path / "out") == ["a.txt", "manifest.json"]
    for path in (tmp_path / "out").iterdir():
        whole = path.read_bytes()
        for place in range(len(whole)):
            for flip in (1, 0x20 ^ 0x0A, 0xFF):  # the second makes white space of white space
                path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
                with pytest.raises(LlmcError, match=rf"{path.name} is not as it was written|is no artifact of llmc"):
                    check_artifact(tmp_path / "out")
        path.write_bytes(whole)
    (tmp_path / "out/a.txt").rename(tmp_path / "out/b.txt")
    with pytest.raises(LlmcError) as caught:
        check_artifact(tmp_path / "out")
    folder = tmp_path / "out"
    assert str(caught.value) == f"{folder}: a.txt is missing\n{folder}: b.txt is not of this artifact"


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


def test_replaces_in_two_steps_where_the_system_has_no_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmc.compiler.artifact._RENAME_EXCHANGE", 1 << 20)  # unknown flag: EINVAL
    test_replaces_an_artifact_whole(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_place_is_replaced_by_force(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with artifact(tmp_path / "out", force=True) as folder:
        (folder / "a.txt").write_text("x")
    assert (tmp_path / "out/a.txt").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_compiles_of_the_same_output_at_the_same_time(tmp_path: Path) -> None:
    """Each is whole while it stands; the last to end stays."""
    code = (
        "import sys; from pathlib import Path; from llmc.compiler.artifact import artifact, write_manifest\n"
        "for turn in range(30):\n"
        "    with artifact(Path(sys.argv[1])) as folder:\n"
        "        (folder / 'a.txt').write_text(sys.argv[2] * 1000)\n"
        "        write_manifest(folder, {'llmc': '0'})\n"
    )
    program = [sys.executable, "-c", code, str(tmp_path / "out")]
    running = [subprocess.Popen([*program, name]) for name in "abc"]
    assert [process.wait() for process in running] == [0, 0, 0]
    check_artifact(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_process_of_another_container_builds_is_left_alone(tmp_path: Path) -> None:
    """It has no number here, but it holds its folder."""
    process = subprocess.Popen(["true"])
    process.wait()
    theirs = tmp_path / f".out.partial-{process.pid}"
    theirs.mkdir()
    held = os.open(theirs, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    make(tmp_path / "out")
    assert theirs.is_dir()
    os.close(held)
    make(tmp_path / "out")
    assert not theirs.exists()


def test_another_compile_of_the_same_output_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".out.partial-{os.getppid()}"
    other.mkdir()
    make(tmp_path / "out")
    assert other.is_dir()


def test_a_block_that_nobody_ends_leaves_nothing(tmp_path: Path) -> None:
    """As where Ctrl-C comes between two lines of contextlib, and the traceback holds the block until the end."""
    script = """
import ctypes, sys
from pathlib import Path
from llmc.compiler.artifact import artifact
block = artifact(Path(sys.argv[1]))
(block.__enter__() / "model.onnx").write_text("half")
ctypes.pythonapi.Py_IncRef(ctypes.py_object(block))
sys.exit(130)
"""
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=False)
    assert ended.returncode == 130
    assert not list(tmp_path.iterdir())
