"""Runs `tensorrt_worker` and makes of its end an answer or an error, however it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO, Any

from llmc.compiler.child import how_it_ended
from llmc.compiler.errors import LlmcError, TargetError
from llmc.compiler.progress import Progress
from llmc.compiler.targets.tensorrt_import import PRODUCT
from llmc.compiler.targets.tensorrt_worker import BuildJob, OperatorsJob, RefusedError

_FIXED_ADDRESSES = """
import ctypes, os, sys
personality = ctypes.CDLL(None).personality
personality.argtypes = [ctypes.c_ulong]
before = personality(0xFFFFFFFF)
if before != -1:
    personality(before | 0x0040000)
os.environ["PYTHONHASHSEED"] = "0"
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Starts its arguments with ADDR_NO_RANDOMIZE (personality(2)), where the system lets it: TensorRT writes some tables
of an engine in the order of addresses, and the same model shall give the same bytes."""
_WORKER = (sys.executable, "-ISc", _FIXED_ADDRESSES, "-P", "-m", "llmc.compiler.targets.tensorrt_worker")
_LAST_LINES = 10


def run(job: BuildJob | OperatorsJob, progress: Progress) -> Any:
    """What the worker answers. It dies with this call: on Ctrl-C too, which it does not see itself.

    Raises RefusedError with TensorRT's reasons, TargetError where the worker died, LlmcError where it could not write.
    """
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            _WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        ) as worker,
    ):
        try:
            phase, answer = _converse(worker, job, progress)
            worker.wait()
        except BaseException:
            worker.kill()
            raise
        if answer is None:
            raise _died(PRODUCT[job["kind"]], worker.returncode, phase, log)
    if "refused" in answer:
        raise RefusedError(answer["refused"])
    if "unwritable" in answer:
        raise LlmcError(f"cannot write {job.get('engine')}: {answer['unwritable']}")
    return answer["done"]


def _converse(
    worker: subprocess.Popen[bytes], job: BuildJob | OperatorsJob, progress: Progress
) -> tuple[str, Mapping[str, Any] | None]:
    """Give the job and hear the worker out: the last phase that it began, and its answer, None where it gave none.

    Its standard input is left open: that is how it knows that it still has a parent.
    """
    assert worker.stdin is not None
    assert worker.stdout is not None
    phase = "starting"
    try:
        worker.stdin.write(json.dumps(job).encode() + b"\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return phase, None
    for line in worker.stdout:
        event = json.loads(line)
        if "phase" not in event:
            return phase, event
        phase = event["phase"]
        progress(phase)
    return phase, None


def _died(product: str, status: int, phase: str, log: IO[bytes]) -> Exception:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    if status > 0:  # a Python exception in the worker
        return RuntimeError(f"{product} worker failed while {phase}:\n" + "\n".join(lines))
    last = "".join(f"\n  {line}" for line in lines[-_LAST_LINES:])
    return TargetError(
        f"{product} {how_it_ended(-status)} while {phase}" + (f"; the end of its log:{last}" if last else "")
    )
