"""Which bytes of which file an array in memory is: weights that a library has mapped are left in their files."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from llmc.passes.graph import Array, Derived, Elementwise, FileRegion, Weights, dtype_name, numpy_dtype


@dataclass(frozen=True)
class Place:
    """Where a weight stands in a file."""

    file: str
    """Its name in the folder."""
    offset: int
    """Bytes."""
    dtype: int
    """ONNX element type that it has there."""
    transposed: bool = False
    """Whether the file has it with its axes the other way round."""


class PlacedWeights(Derived):
    """A weight in a file of the source, as it is there, or transposed, or widened, whenever it is read."""

    def __init__(self, folder: Path, place: Place, onnx_dtype: int, shape: tuple[int, ...]) -> None:
        region = FileRegion(folder / place.file, place.offset)
        stored = Weights(place.dtype, shape[::-1] if place.transposed else shape, region)
        values = Derived(place.dtype, shape, lambda: stored.load().T) if place.transposed else stored
        if onnx_dtype != place.dtype:
            dtype = numpy_dtype(onnx_dtype)
            values = Elementwise(onnx_dtype, values, lambda block: block.astype(dtype))
        super().__init__(onnx_dtype, shape, values.load)
        self.folder, self.place, self._stored, self._values = folder, place, stored, values

    def __reduce__(self) -> tuple[type[PlacedWeights], tuple[Path, Place, int, tuple[int, ...]]]:
        """Pickled as its place: the values stay in the file."""
        return PlacedWeights, (self.folder, self.place, self.onnx_dtype, self.shape)

    def region(self) -> FileRegion | None:
        """Where its bytes stand; None where they do not stand there so."""
        return self._values.region()

    def origin(self) -> tuple[FileRegion, str] | None:
        """As `Weights.origin`, transposed and widened ones too."""
        region = self._stored.region()
        how = [f"from {dtype_name(self.place.dtype)}"] if self.onnx_dtype != self.place.dtype else []
        how += ["transposed"] if self.place.transposed else []
        return None if region is None else (region, " ".join(how))

    def rows(self, rows: slice) -> Array:
        return self._values.rows(rows)

    def blocks(self) -> Iterator[Array]:
        return self._values.blocks()


@dataclass(frozen=True, order=True)
class _Span:
    """Memory that stands for a part of a file."""

    begin: int
    end: int
    place: Place = field(compare=False)
    """Of its first byte; of no type (0) where the file has whatever type the memory has."""


class MappedFiles:
    """The files of a folder that are mapped into this process, as far as nothing was written over them in memory."""

    def __init__(self, folder: Path, files: Collection[Path]) -> None:
        self.folder = folder
        self._spans = sorted(_spans({file.resolve(): file.relative_to(folder).as_posix() for file in files}))

    def add(self, begin: int, length: int, place: Place) -> None:
        """Let `length` bytes of memory from `begin` on stand for what is in a file in another type."""
        insort(self._spans, _Span(begin, begin + length, place))

    def place(self, begin: int, length: int, dtype: int) -> Place | None:
        """Where `length` bytes of memory stand in a file that is mapped there, as values of this type."""
        index = bisect_right(self._spans, begin, key=lambda span: span.begin) - 1
        if index < 0 or begin + length > self._spans[index].end:
            return None
        span = self._spans[index]
        offset = begin - span.begin
        if span.place.dtype:
            offset = offset * numpy_dtype(span.place.dtype).itemsize // numpy_dtype(dtype).itemsize
        return replace(span.place, offset=span.place.offset + offset, dtype=span.place.dtype or dtype)

    def placed(self, array: Array) -> Array | PlacedWeights:
        """The array, as a weight in its file where it is one."""
        transposed = not array.flags.c_contiguous
        if transposed and not array.T.flags.c_contiguous:
            return array
        dtype = int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
        place = self.place(array.__array_interface__["data"][0], array.nbytes, dtype)
        if place is None:
            return array
        return PlacedWeights(self.folder, replace(place, transposed=transposed), dtype, array.shape)


def _spans(names: Mapping[Path, str]) -> Iterator[_Span]:
    """Each mapping of one of the files, unless a page of it was written to: that is anonymous memory from then on."""
    for mapping in _mappings():
        name = names.get(Path(mapping.path))
        if name is not None and not mapping.kilobytes["Anonymous"]:
            yield _Span(mapping.begin, mapping.end, Place(name, mapping.offset, 0))


def touched(begins: Set[int]) -> set[int]:
    """Those mappings, by their first addresses, of which a page is in memory."""
    found = (mapping for mapping in _mappings() if mapping.begin in begins) if begins else ()
    return {mapping.begin for mapping in found if mapping.kilobytes["Rss"] or mapping.kilobytes["Swap"]}


@dataclass
class _Mapping:
    """An entry of this process's memory map (Linux, proc_pid_smaps)."""

    begin: int
    end: int
    offset: int
    """Bytes, in the file."""
    path: str
    kilobytes: dict[str, int]


def _mappings() -> Iterator[_Mapping]:
    maps = Path("/proc/self/smaps")
    if not maps.is_file():
        return
    mapping: _Mapping | None = None
    for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        head, *rest = line.split(maxsplit=5)
        if not head.endswith(":"):
            if mapping is not None:
                yield mapping
            begin, end = (int(address, 16) for address in head.split("-"))
            mapping = _Mapping(begin, end, int(rest[1], 16), rest[4] if len(rest) == 5 else "", {})
        elif mapping is not None and rest[-1] == "kB":
            mapping.kilobytes[head[:-1]] = int(rest[0])
    if mapping is not None:
        yield mapping
