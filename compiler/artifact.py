"""The output directory: built beside its place, complete or absent."""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from llmc.compiler.digest import digests_of
from llmc.compiler.disk import is_full, nearest_existing
from llmc.compiler.errors import LlmcError
from llmc.compiler.progress import Progress, quiet

MANIFEST = "manifest.json"


def check_place(output: Path, *, force: bool) -> None:
    """Raises LlmcError where an artifact may not, or cannot, be put at `output`; leaves nothing there."""
    if output.exists() and not force:
        if not output.is_dir():
            raise LlmcError(f"{output} is a file; choose another directory with -o")
        if any(output.iterdir()) and not is_artifact(output):
            raise LlmcError(f"{output} exists and is no artifact of llmc; add --force to replace it")
    parent = nearest_existing(output.parent)
    if not parent.is_dir():
        raise LlmcError(f"{output} cannot be made: {parent} is a file")
    _remove_abandoned(parent / output.name)
    probe = _partial(parent / output.name)
    try:
        probe.mkdir()  # what counts is whether it works, for root too
        probe.rmdir()
    except FileExistsError:  # another thread builds there now
        pass
    except OSError as error:
        raise LlmcError(
            f"{output} cannot be made: {parent} is not writable; choose another directory with -o"
        ) from error


def is_artifact(folder: Path) -> bool:
    """Whether llmc made this directory: it holds a manifest that says so."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(content, dict) and "llmc" in content
    except (OSError, ValueError):
        return False


@contextmanager
def artifact(output: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory to build in, which becomes `output` when the block ends well and vanishes when it does not.

    Raises LlmcError where `output` may not be replaced, or the disk is full.
    """
    check_place(output, force=force)
    partial = _partial(output)
    vanishes = functools.partial(_remove, partial)
    atexit.register(vanishes)  # an interrupt between the lines of contextlib leaves this generator as it is
    try:
        partial.mkdir(parents=True)
        with _held(partial):
            yield partial
            _sync(partial)
            _swap(partial, output)
    except OSError as error:
        if is_full(error):
            raise LlmcError(
                f"no space left on the disk of {output.parent}; free some, or choose another with -o"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise LlmcError(
                f"{output} cannot be written: {error.strerror}; choose another directory with -o"
            ) from error
        raise
    finally:
        vanishes()
        atexit.unregister(vanishes)


def write_manifest(folder: Path, about: Mapping[str, object], progress: Progress = quiet) -> dict[str, str]:
    """Write `manifest.json`: what `about` says, the SHA-256 of every other file in `folder`, and its own.

    Returns those of the other files.
    """
    files = _digests(folder, progress)
    (folder / MANIFEST).write_text(_signed({**about, "files": files}), encoding="utf-8")
    return files


def check_artifact(folder: Path, progress: Progress = quiet) -> list[str]:
    """The files of an artifact, every one as it was written.

    Raises LlmcError with all that has changed, is missing, or has come in, and where there is no artifact.
    """
    if not is_artifact(folder):
        raise LlmcError(f"{folder} is no artifact of llmc: it has no {MANIFEST}, or a damaged one")
    text = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")
    content = json.loads(text)
    content.pop("manifest", None)
    problems = [] if text == _signed(content) else [f"{MANIFEST} is not as it was written"]
    written, found = content.get("files", {}), _digests(folder, progress)
    for name in sorted({*written, *found} - {MANIFEST}):
        if name not in found:
            problems.append(f"{name} is missing")
        elif name not in written:
            problems.append(f"{name} is not of this artifact")
        elif found[name] != written[name]:
            problems.append(f"{name} is not as it was written")
    if problems:
        raise LlmcError("\n".join(f"{folder}: {problem}" for problem in problems))
    return sorted({*written, MANIFEST})


def _signed(content: Mapping[str, object]) -> str:
    """The manifest's text: the last key has the SHA-256 of what the text would be without it."""
    own = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps({**content, "manifest": own}, indent=2) + "\n"


def _digests(folder: Path, progress: Progress) -> dict[str, str]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return digests_of(files, "digesting the artifact", progress)


def _partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial-{os.getpid():07}")


def _swap(partial: Path, output: Path) -> None:
    """Put `partial` in the place of `output`, and what stood there in its own: one step where the system has it.

    Where another compile puts its own there at the same time, the later one stays.
    """
    while True:
        try:
            if output.exists() and _exchange(partial, output):
                return
            old = output.with_name(f".{output.name}.old-{os.getpid():07}")
            with suppress(FileNotFoundError):
                output.rename(old)
            partial.rename(output)
            _remove(old)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT) or not partial.exists():
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names (renameat2(2), RENAME_EXCHANGE); False where this system cannot. Raises OSError."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a lock on `folder` as long as this process lives, where the file system has such locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_held(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


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
        if kind not in ("partial", "old", "probe") or not process.isdigit() or _alive(int(process)) or _is_held(path):
            continue  # a process of another container has no number here, but its lock
        if kind == "old" and not output.exists():
            path.rename(output)
        else:
            _remove(path)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
