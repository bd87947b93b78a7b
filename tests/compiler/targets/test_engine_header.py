"""The header of an engine, against bytes laid out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.compiler.errors import LlmcError
from llmc.compiler.targets.engine_header import read


def engine(targets: int = 0x12, size: int = 80) -> bytes:
    """An engine of 80 bytes as TensorRT-RTX 1.7.1.116 would begin it, for SM80 and SM120."""
    head = b"vtrt" + bytes(12) + size.to_bytes(8, "little") + bytes([1, 7, 1, 116]) + b"vtrt"
    return head + targets.to_bytes(8, "little") + bytes(16) + (4096).to_bytes(8, "little") + bytes(16)


def test_reads_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(engine())
    header = read(path)
    assert header.version == "1.7.1.116"
    assert header.compute_capabilities == (80, 120)
    assert header.other_capabilities == 0
    assert header.engine_bytes == 80
    assert header.weights_bytes == 4096


def test_keeps_bits_that_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(engine(targets=0x43))
    header = read(path)
    assert header.compute_capabilities == (75, 80)
    assert header.other_capabilities == 0x40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no TensorRT-RTX engine"),
        (b"vtrt", "no TensorRT-RTX engine"),
        (b"\x08\x0a" + bytes(100), "no TensorRT-RTX engine"),
        (engine()[:28] + b"xxxx" + engine()[32:], "no TensorRT-RTX engine"),
        (engine()[:-1], "its header says 80 bytes, the file has 79"),
        (engine() + b"x", "its header says 80 bytes, the file has 81"),
    ],
)
def test_refuses_what_is_no_whole_engine(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(content)
    with pytest.raises(LlmcError, match=message):
        read(path)


def test_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"gone\.engine: cannot be read: No such file"):
        read(tmp_path / "gone.engine")
