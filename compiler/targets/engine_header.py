"""The 64-byte header of a TensorRT-RTX engine: what can be known of an engine on a machine that cannot run it.

The layout is not documented; it was read off engines of TensorRT-RTX 1.7 (little-endian):

| byte | type | content                                |
|------|------|----------------------------------------|
| 0    | 4 B  | magic `vtrt`                           |
| 16   | u64  | bytes of the whole engine              |
| 24   | 4 u8 | version of TensorRT-RTX                |
| 28   | 4 B  | magic again                            |
| 32   | u64  | compute capabilities, one bit for each |
| 56   | u64  | bytes of weights on the device         |
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from llmc.compiler.errors import LlmcError

SIZE = 64
MAGIC = b"vtrt"
CAPABILITY_BITS = {0x01: 75, 0x02: 80, 0x04: 86, 0x08: 89, 0x10: 120, 0x20: 121}
_LAYOUT = struct.Struct("<4s12xQ4B4sQ16xQ")


@dataclass(frozen=True)
class EngineHeader:
    """What the header says; sizes in bytes."""

    version: str
    """Of the TensorRT-RTX that wrote the engine, and that can load it: '1.7.1.116'."""
    compute_capabilities: tuple[int, ...]
    """SM numbers that the engine runs on, ascending."""
    other_capabilities: int
    """Bits of targets that have no known SM number; 0 for none."""
    engine_bytes: int
    weights_bytes: int


def read(path: Path) -> EngineHeader:
    """Read the header of a TensorRT-RTX engine and hold its size against the file's.

    Raises LlmcError where the file cannot be read, is no such engine, or is not whole.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE)
        size = path.stat().st_size
    except OSError as error:
        raise LlmcError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) < SIZE or raw[:4] != MAGIC or raw[28:32] != MAGIC:
        raise LlmcError(f"{path}: is no TensorRT-RTX engine (these begin with the bytes 'vtrt')")
    _, engine_bytes, *version, _, targets, weights_bytes = _LAYOUT.unpack(raw)
    if engine_bytes != size:
        raise LlmcError(f"{path}: is no whole engine: its header says {engine_bytes:,} bytes, the file has {size:,}")
    return EngineHeader(
        version=".".join(map(str, version)),
        compute_capabilities=tuple(sm for bit, sm in CAPABILITY_BITS.items() if targets & bit),
        other_capabilities=targets & ~sum(CAPABILITY_BITS),
        engine_bytes=engine_bytes,
        weights_bytes=weights_bytes,
    )
