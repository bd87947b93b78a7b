"""Which bytes of which file an array in memory is: weights that a library has mapped are left in their files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from llmc.passes.graph import Array, Derived, FileRegion, Weights


@dataclass(frozen=True)
class Place:
    """Where a weight stands in a file."""

    file: str
    """Its name in the folder."""
    offset: int
    """Bytes."""
    transposed: bool
    """Whether the file has it with its axes the other way round."""


class PlacedWeights(Derived):
    """A weight in a file of the source, as it is there or transposed."""

    def __init__(self, folder: Path, place: Place, onnx_dtype: int, shape: tuple[int, ...]) -> None:
        region = FileRegion(folder / place.file, place.offset)
        stored = Weights(onnx_dtype, shape[::-1] if place.transposed else shape, region)
        super().__init__(onnx_dtype, shape, lambda: stored.load().T if place.transposed else stored.load())
        self.place, self._stored = place, stored

    def region(self) -> FileRegion | None:
        """Where its bytes stand; None where they stand there transposed."""
        return None if self.place.transposed else self._stored.region()

    def origin(self) -> tuple[FileRegion, str] | None:
        """As `Weights.origin`, transposed ones too."""
        region = self._stored.region()
        return None if region is None else (region, "transposed" if self.place.transposed else "")


class MappedFiles:
    """The files of a folder that are mapped into this process, as far as nothing was written over them in memory."""

    def __init__(self, folder: Path, files: Collection[Path]) -> None:
        self.folder = folder
        self._spans = sorted(_spans({file.resolve(): file.relative_to(folder).as_posix() for file in files}))

    def placed(self, array: Array) -> Array | PlacedWeights:
        """The array, as a weight in its file where it is one."""
        transposed = not array.flags.c_contiguous
        if transposed and not array.T.flags.c_contiguous:
            return array
        begin = array.__array_interface__["data"][0]
        index = bisect_right(self._spans, (begin, float("inf"))) - 1
        if index < 0 or begin + array.nbytes > self._spans[index][1]:
            return array
        start, _, offset, name = self._spans[index]
        dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return PlacedWeights(self.folder, Place(name, offset + begin - start, transposed), dtype, array.shape)


def _spans(names: dict[Path, str]) -> Iterator[tuple[int, float, int, str]]:
    """(first address, address behind the last, offset in the file, name) of each mapping of one of the files.

    A page that was written to is anonymous memory from then on, and its mapping is left out (Linux, proc_pid_smaps).
    """
    maps = Path("/proc/self/smaps")
    if not maps.is_file():
        return
    span: Any = None
    for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        head, *rest = line.split(maxsplit=5)
        if head.endswith(":"):
            if span and head == "Anonymous:" and rest[0] == "0":
                yield span
        else:
            name = names.get(Path(rest[4])) if len(rest) == 5 else None
            begin, end = (int(address, 16) for address in head.split("-"))
            span = (begin, end, int(rest[1], 16), name) if name is not None else None
