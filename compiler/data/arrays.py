"""Samples that stand ready in .npz files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llmc.compiler.data.fit import fit
from llmc.compiler.data.samples import Samples
from llmc.compiler.digest import digest_files
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Feeds
from llmc.passes.graph import Array, Tensor, shape_of


def from_folder(path: Path, inputs: Sequence[Tensor]) -> Samples:
    files = sorted(path.glob("*.npz")) or _single_arrays(path, inputs)
    for file in files:
        _read_npz(file, inputs)
    digest = digest_files({file.name: file for file in files})
    return Samples(path.name, digest, False, len(files), lambda: (_read_npz(file, inputs) for file in files))


def _single_arrays(path: Path, inputs: Sequence[Tensor]) -> list[Path]:
    """The folder's .npy files, each the one input of a sample. Raises LlmcError where it has none."""
    files = sorted(path.glob("*.npy"))
    if not files:
        raise LlmcError(f"{path} holds no .npz files, no .npy files and no images")
    if len(inputs) > 1:
        names = ", ".join(tensor.name for tensor in inputs)
        raise LlmcError(
            f"{path} holds .npy files, one array each, but the model has {len(inputs)} inputs ({names}): save .npz"
        )
    return files


def from_rows(path: Path, inputs: Sequence[Tensor]) -> Samples:
    feeds = _read_npz(path, inputs)
    digest = digest_files({path.name: path})
    if not _has_common_batch(inputs):
        return Samples(path.name, digest, False, 1, lambda: [feeds])
    rows = next(iter(feeds.values())).shape[0]
    if not rows:
        raise LlmcError(f"{path} holds no samples: its arrays have 0 rows")

    def make() -> Iterator[Feeds]:
        for row in range(rows):
            yield {name: array[row : row + 1] for name, array in feeds.items()}

    return Samples(path.name, digest, False, rows, make)


def _has_common_batch(inputs: Sequence[Tensor]) -> bool:
    firsts = {(shape_of(tensor) or (None,))[0] for tensor in inputs}
    return len(firsts) == 1 and isinstance(firsts.pop(), str)


def _read_npz(path: Path, inputs: Sequence[Tensor]) -> dict[str, Array]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile) and len(inputs) == 1:
                archive = {inputs[0].name: archive}
            elif not isinstance(archive, np.lib.npyio.NpzFile):
                raise LlmcError(f"{path} is a single array (.npy), not an .npz file with one array per input")
            return fit(archive, inputs, path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise LlmcError(f"{path} is not an .npz file of plain arrays: {error}") from error
