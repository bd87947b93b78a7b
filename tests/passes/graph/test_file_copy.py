"""Bytes that the kernel copies, or that are read and written where it does not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from llmc.passes.errors import LlmcError
from llmc.passes.graph import FileRegion, append_region
from llmc.passes.graph.file_copy import BLOCK, append_bytes


@pytest.fixture(params=["kernel", "another file system", "appending", "stops half-way"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the kernel answers copy_file_range(2)."""
    real, calls = os.copy_file_range, iter(range(1000))

    def refuse(*_words: int) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def half(source: int, target: int, count: int, begin: int, end: int) -> int:
        return refuse() if next(calls) else real(source, target, count // 2, begin, end)

    if request.param == "another file system":
        monkeypatch.setattr(os, "copy_file_range", refuse)
    elif request.param == "stops half-way":
        monkeypatch.setattr(os, "copy_file_range", half)
    return str(request.param)


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (7, 5000), (4096, 2 * BLOCK + 3), (0, 3 * BLOCK)])
def test_appends_exactly_the_bytes(way: str, offset: int, length: int, tmp_path: Path) -> None:
    content = np.random.default_rng(length).bytes(offset + length + 100)
    (tmp_path / "source").write_bytes(content)
    (tmp_path / "target").touch()
    counts = list[int]()
    with (tmp_path / "target").open("ab" if way == "appending" else "r+b") as file:
        file.write(b"before")
        append_region(file, FileRegion(tmp_path / "source", offset), length, counts.append)
        assert file.tell() == 6 + length
        file.write(b"after")
    assert (tmp_path / "target").read_bytes() == b"before" + content[offset : offset + length] + b"after"
    assert sum(counts) == length
    assert len(counts) >= length / BLOCK  # whoever watches hears of every block


@pytest.mark.usefixtures("way")
def test_a_source_that_was_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 10)
    with (tmp_path / "target").open("wb") as file, pytest.raises(LlmcError, match="source ends before byte 14"):
        append_region(file, FileRegion(tmp_path / "source", 4), 10)


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 10)
    with pytest.raises(OSError, match="No space left"), Path("/dev/full").open("wb") as file:
        append_region(file, FileRegion(tmp_path / "source", 0), 10)
    with pytest.raises(OSError, match="No space left"), Path("/dev/full").open("wb") as file:
        append_bytes(file, memoryview(b"x" * 10))
