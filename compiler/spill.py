"""Values on disk instead of in memory: what a large model computes on the way, until somebody reads it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from llmc.compiler.errors import LlmcError
from llmc.passes.graph import Array, Weights, contiguous

SPILLED_FROM = 1 << 16
"""Bytes from which a value is worth a place on disk."""
_FOLDER: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextmanager
def spilling_to(folder: Path) -> Iterator[None]:
    """Within the block, values are spilled to files on the disk of `folder` (else where temporary files go)."""
    token = _FOLDER.set(next(place for place in (folder, *folder.absolute().parents) if place.is_dir()))
    try:
        yield
    finally:
        _FOLDER.reset(token)


def spill_folder() -> Path:
    """Where large values go that are in nobody's way there."""
    return _FOLDER.get() or Path(tempfile.gettempdir())


class Spill:
    """Takes values one by one and gives all of them back, the large ones as views of one mapped file.

    The file has no name, so that it goes with the last view of it, or with the process, however that ends.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._held: list[Array | tuple[int, np.dtype[Any], tuple[int, ...]]] = []

    def put(self, value: Array) -> int:
        """Take a value of a type of NumPy's own; its number. Raises LlmcError where it cannot be written."""
        if value.nbytes < SPILLED_FROM:
            self._held.append(value)
        else:
            self._append(value.dtype, value.shape, [value])
        return len(self._held) - 1

    def put_weight(self, held: Weights) -> int:
        """Take a large weight block by block, as it is computed; its number. Raises what `put` does."""
        self._append(held.dtype, held.shape, held.blocks())
        return len(self._held) - 1

    def _append(self, dtype: np.dtype[Any], shape: tuple[int, ...], blocks: Iterable[Array]) -> None:
        try:
            self._file = self._file or tempfile.TemporaryFile(dir=spill_folder())  # noqa: SIM115 - closed in `values`
            self._held.append((self._file.tell(), dtype, shape))
            for block in blocks:
                self._file.write(contiguous(block).reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise LlmcError(f"values cannot be written in {spill_folder()}: {error.strerror or error}") from error

    def values(self) -> list[Array]:
        """All values by their numbers; large ones are read-only. Nothing can be put any more."""
        if self._file is None:
            return [value for value in self._held if not isinstance(value, tuple)]
        with self._file as file:
            file.flush()
            mapped: Array = np.memmap(file, np.uint8, "r")
        return [_view(mapped, *held) if isinstance(held, tuple) else held for held in self._held]


def _view(mapped: Array, begin: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    return mapped[begin : begin + dtype.itemsize * prod(shape)].view(dtype).reshape(shape)
