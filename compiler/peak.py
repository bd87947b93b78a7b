"""Memory of this process: how much it has had at most, and what it need not hold on to."""

from __future__ import annotations

import ctypes
from pathlib import Path

from llmc.passes.graph import collect


def peak_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Of this process since it began, pages of mapped files included; None where the system does not tell (proc(5))."""
    try:
        lines = status.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("VmHWM:")), None)
    return int(found[1]) * 1024 if found else None


def give_back() -> None:
    """Give garbage, and what the C library keeps for later, back to the system."""
    collect()
    trim()


def trim() -> None:
    """Give what the C library keeps for later back to the system (glibc; elsewhere nothing)."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
