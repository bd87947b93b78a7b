from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from llmc.compiler.loaders.mapped import MappedFiles, Place, PlacedWeights
from llmc.passes.graph import Array

OFFSET = 8192


@pytest.fixture
def written(tmp_path: Path) -> Array:
    """float16 [96, 64] that stand in 'a file' from OFFSET on."""
    values = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float16)
    (tmp_path / "a file").write_bytes(bytes(OFFSET) + values.tobytes() + bytes(100))
    return values


def mapped(path: Path, mode: str = "r") -> Array:
    return np.memmap(path, np.uint8, mode=mode)[OFFSET : OFFSET + 2 * 96 * 64].view(np.float16).reshape(96, 64)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_mapped_array_is_found_in_its_file(tmp_path: Path, written: Array, transposed: bool) -> None:
    array = mapped(tmp_path / "a file")
    given = array.T if transposed else array
    found = MappedFiles(tmp_path, [tmp_path / "a file"]).placed(given)
    assert isinstance(found, PlacedWeights)
    assert found.place == Place("a file", OFFSET, onnx.TensorProto.FLOAT16, transposed)
    assert (found.shape, found.dtype, found.nbytes) == (given.shape, given.dtype, given.nbytes)
    del array, given
    np.testing.assert_array_equal(found.load(), written.T if transposed else written)
    assert not found.load().flags.writeable


def test_a_part_of_one_has_its_own_offset(tmp_path: Path, written: Array) -> None:
    array = mapped(tmp_path / "a file")
    found = MappedFiles(tmp_path, [tmp_path / "a file"]).placed(array[8:16])
    assert isinstance(found, PlacedWeights)
    assert found.place.offset == OFFSET + 8 * 128
    np.testing.assert_array_equal(found.load(), written[8:16])


def test_what_is_not_as_the_file_has_it_stays_in_memory(tmp_path: Path, written: Array) -> None:
    """Copies, other files, other layouts; and a mapping that was written over, which the file does not learn of."""
    array = mapped(tmp_path / "a file")
    files = MappedFiles(tmp_path, [tmp_path / "a file"])
    for strange in (np.array(array), array[:, ::2], array[::2]):
        assert files.placed(strange) is strange
    (tmp_path / "another").write_bytes(b"")
    assert MappedFiles(tmp_path, [tmp_path / "another"]).placed(array) is array
    del array
    private = mapped(tmp_path / "a file", "c")
    private[50, 3] = 7
    assert MappedFiles(tmp_path, [tmp_path / "a file"]).placed(private) is private
    assert written[50, 3] != 7
