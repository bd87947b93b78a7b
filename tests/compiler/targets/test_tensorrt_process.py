"""However the worker ends, llmc says how, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.errors import LlmcError, TargetError
from llmc.compiler.targets import BuildRequest
from llmc.compiler.targets.tensorrt import TensorRT
from llmc.compiler.targets.tensorrt_import import availability
from llmc.compiler.targets.tensorrt_process import _WORKER
from llmc.compiler.targets.tensorrt_worker import BuildJob
from llmc.passes.graph import save_model

pytestmark = pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason=availability("tensorrt-rtx").missing)
TARGET = TensorRT("tensorrt-rtx")
REQUEST = BuildRequest(profiles=(), compute_capabilities=(89,))


@pytest.fixture
def model(parse: Any, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    save_model(parse("(float[8,64] x, float[64,64] w) => (float[8,64] y) { y = MatMul(x, w) }"), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "artifact"
    path.mkdir()
    return path


def children() -> list[int]:
    me = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()]


def at_loading(act: Callable[[], None]) -> Callable[[str], None]:
    """Calls `act` when the worker has said its first phase: long before it can have built anything."""

    def progress(phase: str) -> None:
        if phase.startswith("loading"):
            act()

    return progress


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGKILL, r"TensorRT-RTX was killed \(SIGKILL\), most often because memory ran out while loading"),
        (signal.SIGSEGV, r"TensorRT-RTX crashed \(SIGSEGV\) while loading TensorRT-RTX"),
        (signal.SIGABRT, r"TensorRT-RTX aborted \(SIGABRT\) while"),
        (signal.SIGTERM, r"TensorRT-RTX was ended by SIGTERM while"),
    ],
)
def test_a_worker_that_dies_is_a_target_error(number: int, how: str, model: Path, folder: Path) -> None:
    before = set(children())

    def strike() -> None:
        (worker,) = set(children()) - before
        os.kill(worker, number)

    with pytest.raises(TargetError, match=how):
        TARGET.build(model, folder, REQUEST, at_loading(strike))
    assert not list(folder.iterdir())


def test_a_crash_shows_the_end_of_the_log(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; os.write(2, b'[INFO] the last words\\n'); os.abort()"
    monkeypatch.setattr("llmc.compiler.targets.tensorrt_process._WORKER", (sys.executable, "-c", code))
    with pytest.raises(TargetError, match=r"aborted \(SIGABRT\) while starting; [a-z ]+:\n  \[INFO\] the last"):
        TARGET.build(model, folder, REQUEST, lambda _: None)


def test_a_python_error_in_the_worker_is_our_own_bug(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmc.compiler.targets.tensorrt_process._WORKER", (sys.executable, "-c", "1/0"))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        TARGET.build(model, folder, REQUEST, lambda _: None)


def test_an_interrupt_ends_the_worker_and_leaves_nothing(model: Path, folder: Path) -> None:
    before = set(children())

    def interrupt(phase: str) -> None:
        if phase.startswith("building"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TARGET.build(model, folder, REQUEST, interrupt)
    assert set(children()) <= before
    assert not list(folder.iterdir())


BUILD_AND_WAIT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with it ignored
from pathlib import Path
from llmc.compiler.targets import BuildRequest
from llmc.compiler.targets.tensorrt import TensorRT
def progress(phase):
    if phase.startswith("building"):
        print("building", flush=True)
        time.sleep(60)
try:
    TensorRT("tensorrt-rtx").build(Path(sys.argv[1]), Path(sys.argv[2]), BuildRequest((), (89,)), progress)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_both_and_leaves_nothing(model: Path, folder: Path) -> None:
    command = [sys.executable, "-P", "-c", BUILD_AND_WAIT, str(model), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "building\n"
        (worker,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.send_signal(signal.SIGINT)
        assert parent.stdout.read() == "interrupted\n"
    assert not Path(f"/proc/{worker}").exists()
    assert not list(folder.iterdir())


def test_a_worker_whose_parent_is_gone_ends_and_takes_its_file_along(model: Path, tmp_path: Path) -> None:
    engine = tmp_path / "model.engine.partial"
    os.mkfifo(engine)  # writing to it takes for ever
    job = BuildJob(
        kind="tensorrt-rtx",
        model=str(model),
        engine=str(engine),
        profiles=[],
        compute_capabilities=[89],
        workspace=None,
        plugins=[],
    )
    with subprocess.Popen(_WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(job).encode() + b"\n")
        worker.stdin.flush()
        phases = [json.loads(worker.stdout.readline())["phase"] for _ in range(3)]
        assert phases == ["loading TensorRT-RTX", "parsing model.onnx", "building for SM89"]
        worker.stdin.close()
        try:
            assert worker.wait(timeout=10) in (0, 1)  # nobody is left to read it; 0 where the file was gone first
        finally:
            worker.kill()
    assert not engine.exists()


def test_no_space_left_is_said_and_leaves_nothing(model: Path, folder: Path) -> None:
    (folder / "model.engine.partial").symlink_to("/dev/full")
    with pytest.raises(LlmcError, match=r"cannot write .*model\.engine\.partial: No space left on device") as error:
        TARGET.build(model, folder, REQUEST, lambda _: None)
    assert error.value.exit_code == 2
    assert not list(folder.iterdir())


def test_a_folder_that_is_not_there_is_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"cannot write .*: No such file or directory"):
        TARGET.build(model, tmp_path / "gone", REQUEST, lambda _: None)
