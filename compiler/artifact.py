"""The output directory: built beside its place, complete or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llmc.compiler.errors import LlmcError

MANIFEST = "manifest.json"


def check_place(output: Path, *, force: bool) -> None:
    """Raises LlmcError where an artifact may not, or cannot, be put at `output`; leaves nothing there."""
    if output.exists() and not force:
        if not output.is_dir():
            raise LlmcError(f"{output} is a file; choose another directory with -o")
        if any(output.iterdir()) and not is_artifact(output):
            raise LlmcError(f"{output} exists and is no artifact of llmc; add --force to replace it")
    parent = _nearest_existing(output.parent)
    if not parent.is_dir():
        raise LlmcError(f"{output} cannot be made: {parent} is a file")
    try:
        Path(tempfile.mkdtemp(prefix=".llmc-", dir=parent)).rmdir()  # what counts is whether it works, for root too
    except OSError as error:
        raise LlmcError(
            f"{output} cannot be made: {parent} is not writable; choose another directory with -o"
        ) from error


def is_artifact(folder: Path) -> bool:
    """Whether llmc made this directory: it holds a manifest that says so."""
    try:
        return "llmc" in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


@contextmanager
def artifact(output: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory to build in, which becomes `output` when the block ends well and vanishes when it does not.

    Raises LlmcError where `output` may not be replaced, or the disk is full.
    """
    check_place(output, force=force)
    partial = output.with_name(f".{output.name}.partial-{os.getpid():07}")
    _remove_abandoned(output)
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        _swap(partial, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LlmcError(
                f"no space left on the disk of {output.parent}; free some, or choose another with -o"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise LlmcError(
                f"{output} cannot be written: {error.strerror}; choose another directory with -o"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(folder: Path, about: Mapping[str, object]) -> None:
    """Write `manifest.json`: what `about` says, and the SHA-256 of every other file in `folder`."""
    files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    text = json.dumps({**about, "files": files}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _swap(partial: Path, output: Path) -> None:
    """Put `partial` in the place of `output`; what stood there goes when the new one is in place."""
    old = output.with_name(f".{output.name}.old-{os.getpid():07}")
    if output.exists():
        output.rename(old)
    partial.rename(output)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Have every file on the disk before the directory takes its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove_abandoned(output: Path) -> None:
    """Directories that a killed compile of the same output left behind; an old artifact goes back to its place."""
    if not output.parent.is_dir():
        return
    for path in output.parent.glob(f".{output.name}.*-*"):
        kind, _, process = path.name.removeprefix(f".{output.name}.").rpartition("-")
        if kind not in ("partial", "old") or not process.isdigit() or _alive(int(process)):
            continue
        if kind == "old" and not output.exists():
            path.rename(output)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
