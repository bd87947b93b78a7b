"""Records and blobs on disk: written beside their place and renamed, verified by digest when read.

    lock                  taken exclusively while entries are removed, shared while some are looked up
    sessions/PID-*/       of a live process: its temporary files, and a lock that ends with it
    records/KIND/KEY      SHA-256 of the rest, then JSON: the result, and the blobs that it refers to
    blobs/SHA256          bytes, by their own digest

An entry's modification time is its last use. What is used while a process lives is not removed before that has ended:
so a compile can read blobs at any time, weights straight from the mapped file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmc.compiler.digest import sha256
from llmc.compiler.disk import free_bytes
from llmc.passes.graph import FileRegion, append_region

VERSION = "v1"
"""Of this layout: the folder in the cache's place that it stands in."""
_LOGGER = logging.getLogger("llmc.cache")


class DamagedError(Exception):
    """A blob was not what its name says, or not there any more. It is dropped: to begin again makes it anew."""


class FullError(OSError):
    """What would be written is more than the cache may hold."""


@dataclass(frozen=True)
class Record:
    """A result: plain values, and the digests of the blobs that belong to it."""

    value: Mapping[str, Any]
    blobs: tuple[str, ...]


class Store:
    """One process's access to the cache, between `open` and `close`; safe beside any number of others."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root / VERSION
        self.limit = limit
        self.written = 0
        """Bytes, by this process."""
        self.left = 0
        """Bytes that it leaves on its disk."""
        self._session: Path | None = None
        self._session_lock: IO[bytes] | None = None
        self._verified: set[str] = set()
        self._used: set[str] = set()
        """Blobs whose use is on record: while this process lives none of them is removed."""

    def open(self) -> None:
        """Begin to use it. Raises OSError where the place cannot be written."""
        for name in ("blobs", "records", "sessions"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        with self.locked(exclusive=True):
            self.other_sessions()
            self._session = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self.root / "sessions"))
            self._session_lock = (self._session / "lock").open("wb")
            fcntl.flock(self._session_lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """End the use: what this process has read and written may be removed from now on."""
        if self._session is not None and self._session_lock is not None:
            shutil.rmtree(self._session, ignore_errors=True)
            self._session_lock.close()

    # Records

    def find(self, kind: str, key: str) -> Record | None:
        """The record, if it is there whole and has all of its blobs; counts as a use of them."""
        path = self._record(kind, key)
        with self.locked():
            try:
                text = path.read_bytes()
            except FileNotFoundError:
                return None
            record = parse_record(text)
            if record is None:
                self.drop(path, f"{kind} record")
                return None
            try:
                for blob in record.blobs:
                    self._use(blob)
                os.utime(path)
            except FileNotFoundError:  # a blob was damaged and dropped, or removed by hand
                return None
        return record

    def keep(self, kind: str, key: str, value: Mapping[str, Any], blobs: Sequence[str] = ()) -> None:
        """Write a record; its blobs must be there. Raises OSError."""
        body = json.dumps({"value": value, "blobs": sorted(set(blobs))}, separators=(",", ":")).encode()
        text = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        self._make_room(len(text))
        path = self._record(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._temporary() as file:
            file.write(text)
            file.close()
            Path(file.name).replace(path)
        self.written += len(text)

    # Blobs

    def add(self, data: bytes | memoryview) -> str:
        """Write bytes that are not there yet; returns their digest. Raises OSError."""
        digest = hashlib.sha256(data).hexdigest()
        return digest if self.has(digest) else self.add_blocks([data], len(data))

    def add_blocks(self, blocks: Iterable[bytes | memoryview], size: int) -> str:
        """Write the `size` bytes that these are in all, as they come; returns their digest. Raises OSError."""
        self._make_room(size)
        sha = hashlib.sha256()
        with self._temporary() as file:
            for block in blocks:
                sha.update(block)
                file.write(block)
            file.close()
            self.written += size
            return self._settle(Path(file.name), sha.hexdigest())

    def add_file(self, path: Path) -> str:
        """Take in a copy of a file; returns its digest. The disk shares the bytes where it can. Raises OSError."""
        size = path.stat().st_size
        self._make_room(size)
        with self._temporary() as file:
            file.close()
            copy(path, Path(file.name))
            self.written += size
            return self._settle(Path(file.name), sha256(Path(file.name)))

    def add_written(self, write: Callable[[IO[bytes]], None]) -> str:
        """Take in what `write` writes to the file that it is given; returns its digest. Raises OSError."""
        with self._temporary() as file:
            write(file)
            file.close()
            path = Path(file.name)
            self._make_room(path.stat().st_size)
            self.written += path.stat().st_size
            return self._settle(path, sha256(path))

    def has(self, digest: str) -> bool:
        """Whether a blob is there; counts as a use of it."""
        with self.locked():
            try:
                self._use(digest)
            except FileNotFoundError:
                return False
        return True

    def blob(self, digest: str) -> Path:
        """The file that holds a blob, its bytes verified (once a process). Raises DamagedError."""
        path = self.path(digest)
        if digest not in self._verified:
            try:
                whole = sha256(path) == digest
            except FileNotFoundError as error:
                self._used.discard(digest)
                raise DamagedError(f"{path} has vanished") from error
            if not whole:
                self._used.discard(digest)
                self.drop(path, "blob")
                raise DamagedError(f"{path} is damaged")
            self._verified.add(digest)
        return path

    def _use(self, digest: str) -> None:
        """Put the use of a blob on record, once a process. Raises FileNotFoundError."""
        if digest not in self._used:
            os.utime(self.path(digest))
            self._used.add(digest)

    # Locks and leftovers

    @contextmanager
    def locked(self, *, exclusive: bool = False) -> Iterator[None]:
        """Hold the cache's lock; nothing is removed by others inside."""
        with (self.root / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield

    def other_sessions(self) -> list[int]:
        """When each other live process began to use the cache, in nanoseconds since 1970. Cleans up after killed ones.

        The lock must be held exclusively.
        """
        begun = []
        for session in (self.root / "sessions").iterdir():
            if session == self._session:
                continue
            if is_held(session / "lock"):
                begun.append((session / "lock").stat().st_mtime_ns)
            else:
                shutil.rmtree(session, ignore_errors=True)
        return begun

    def _settle(self, written: Path, digest: str) -> str:
        path = self.path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.locked():
            written.replace(path)
        self._verified.add(digest)
        return digest

    @contextmanager
    def _temporary(self) -> Iterator[IO[bytes]]:
        with tempfile.NamedTemporaryFile(dir=self._session, delete=False) as file:
            try:
                yield file
            finally:
                Path(file.name).unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        if self.written + size > self.limit:
            raise FullError(errno.EDQUOT, f"more than the limit of {self.limit:,} bytes (LLMC_CACHE_LIMIT)")
        if self.left and free_bytes(self.root) < size + self.left:
            raise FullError(errno.ENOSPC, "the output needs what room is left on its disk")

    def drop(self, path: Path, what: str) -> None:
        """Remove what is damaged, and say so."""
        _LOGGER.warning("%s of the cache is damaged and was dropped: %s", what, path)
        path.unlink(missing_ok=True)

    def _record(self, kind: str, key: str) -> Path:
        return self.root / "records" / kind / key[:2] / key

    def path(self, digest: str) -> Path:
        """Where a blob stands, whether it is there or not."""
        return self.root / "blobs" / digest[:2] / digest


def parse_record(text: bytes) -> Record | None:
    """What `keep` wrote; None where a byte of it has changed."""
    digest, _, body = text.partition(b"\n")
    if digest != hashlib.sha256(body).hexdigest().encode():
        return None
    content = json.loads(body)
    return Record(content["value"], tuple(content["blobs"]))


def is_held(lock: Path) -> bool:
    """Whether a process holds this lock file."""
    try:
        with lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes inside the kernel: file systems that can (btrfs, XFS) share them instead."""
    with target.open("wb") as file:
        append_region(file, FileRegion(source, 0), source.stat().st_size)
