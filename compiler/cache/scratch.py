"""Large tensors of one compile, in a file without a name: whatever ends the compile, the disk has its space back."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmc.compiler.errors import LlmcError
from llmc.compiler.spill import spill_folder
from llmc.passes.graph import ALIGNMENT, FileRegion


class _Unnamed:
    """A temporary file on the disk of `folder`, which is gone with this object."""

    def __init__(self, folder: Path) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            self.descriptor = os.dup(file.fileno())
        self.size = 0

    def __del__(self) -> None:
        os.close(self.descriptor)

    def append(self, raw: memoryview) -> int:
        """Write the bytes from the next multiple of `ALIGNMENT` on; where they begin."""
        begin = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.size = begin
        while self.size < begin + len(raw):
            self.size += os.pwrite(self.descriptor, raw[self.size - begin :], self.size)
        return begin


@dataclass(frozen=True)
class ScratchRegion(FileRegion):
    """Bytes in a file that is there as long as somebody holds this."""

    file: _Unnamed


class Scratch:
    """Bytes one after the other in a file that is made when the first ones come."""

    def __init__(self) -> None:
        self._file: _Unnamed | None = None

    def add(self, raw: memoryview) -> ScratchRegion:
        """Where the bytes are from now on, to be mapped. Raises LlmcError where they cannot be written."""
        try:
            self._file = self._file or _Unnamed(spill_folder())
            begin = self._file.append(raw)
        except OSError as error:
            raise LlmcError(f"weights cannot be written in {spill_folder()}: {error.strerror or error}") from error
        return ScratchRegion(Path(f"/proc/self/fd/{self._file.descriptor}"), begin, self._file)
