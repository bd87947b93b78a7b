"""SHA-256 of files, told block by block: those of a large model take a while."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from llmc.compiler.progress import Counted, Progress, quiet
from llmc.passes.graph import Wrote, nobody

_BLOCK = 1 << 20


def sha256(path: Path, read: Wrote = nobody) -> str:
    """Of a file's bytes, in hexadecimal; `read` is told of each block."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            read(count)
    return digest.hexdigest()


def digests_of(files: Mapping[str, Path], phase: str, progress: Progress = quiet) -> dict[str, str]:
    """Name → SHA-256, sorted by name; `phase` is what the reading is called."""
    total = sum(path.stat().st_size for path in files.values())
    told = Counted(progress, phase, total, len(files), "file")
    return {name: sha256(files[name], partial(told, name)) for name in sorted(files)}


class SourceFiles:
    """The files of a source, each of which is read once, however often it is asked for."""

    def __init__(self, progress: Progress = quiet) -> None:
        self.digests: dict[Path, str] = {}
        """Resolved path → SHA-256, of those that were asked for."""
        self._progress = progress

    def digest(self, files: Mapping[str, Path]) -> str:
        """SHA-256 of a file, or of the lines that `sha256sum` prints for several, sorted by name."""
        unread = {name: path for name, path in files.items() if path.resolve() not in self.digests}
        if unread:
            found = digests_of(unread, "reading the model's files", self._progress)
            self.digests |= {unread[name].resolve(): digest for name, digest in found.items()}
        known = {name: self.digests[files[name].resolve()] for name in sorted(files)}
        if len(known) == 1:
            return next(iter(known.values()))
        return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in known.items()).encode()).hexdigest()


def digest_files(files: Mapping[str, Path]) -> str:
    """As `SourceFiles.digest`, of files that are read once only."""
    return SourceFiles().digest(files)
