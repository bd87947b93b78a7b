"""Bytes that get into another file without passing through this process: copied by the kernel, shared, or linked."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from llmc.passes.errors import LlmcError
from llmc.passes.graph.tensors import FileRegion

Wrote = Callable[[int], None]
"""Called with the number of bytes just written, a block at a time."""
BLOCK = 16 << 20
"""Bytes between two calls of a `Wrote`, and between two moments at which Ctrl-C is heard."""
_CHUNK = 1 << 20
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
"""Of copy_file_range(2): other file systems, none that has it, a sandbox that forbids it, a file opened to append."""

_FICLONE = 0x40049409
"""ioctl_ficlone(2), of btrfs, XFS and others."""


def nobody(_count: int) -> None:
    """A `Wrote` that nobody listens to."""


def append_region(file: IO[bytes], region: FileRegion, length: int, wrote: Wrote = nobody) -> None:
    """Append `length` bytes of a file to `file`; no byte passes through this process where the kernel can do it.

    Raises LlmcError where the file has become too short, OSError where `file` cannot be written.
    """
    file.flush()
    start, done, inside = file.tell(), 0, True
    with region.path.open("rb") as source:
        while done < length:
            count = 0
            if inside:
                inside = bool(count := _inside(source, region.offset + done, file, start + done, length - done))
            if not inside:
                file.seek(start + done)
                count = _through(source, region.offset + done, file, length - done)
            if not count:
                raise LlmcError(f"{region.path} ends before byte {region.offset + length}: it was cut after loading")
            done += count
            wrote(count)
    file.seek(start + done)


def append_bytes(file: IO[bytes], data: memoryview, wrote: Wrote = nobody) -> None:
    """Append bytes that are in memory, or mapped, to `file`. Raises OSError."""
    for begin in range(0, len(data), BLOCK):
        wrote(file.write(data[begin : begin + BLOCK]))


def _inside(source: IO[bytes], begin: int, target: IO[bytes], end: int, left: int) -> int:
    """Have the kernel copy a block; the bytes it copied, 0 where it cannot."""
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), min(left, BLOCK), begin, end)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return 0


def _through(source: IO[bytes], begin: int, target: IO[bytes], left: int) -> int:
    """Read and write a chunk; the bytes copied, 0 at the end of the file."""
    return target.write(os.pread(source.fileno(), min(left, _CHUNK), begin))


def link(source: Path, target: Path) -> None:
    """Have `target`, a new name, give the bytes of `source` without a copy: a clone, or else a hard link.

    Raises OSError where neither can be made.
    """
    if not clone(source, target):
        os.link(source.resolve(), target)  # a link to a symbolic link would be one too


def clone(source: Path, target: Path) -> bool:
    """Make `target`, a new file, share all blocks of `source`; False, and no file, where the file system cannot.

    The two are independent: what is written to one later does not show in the other.
    """
    with source.open("rb") as read:
        try:
            with target.open("xb") as write:
                fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        except FileExistsError:
            raise
        except OSError:
            target.unlink(missing_ok=True)
            return False
    return True
