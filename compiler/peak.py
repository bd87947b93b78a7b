"""How much memory a process has had at most."""

from __future__ import annotations

from pathlib import Path


def peak_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Of this process since it began, pages of mapped files included; None where the system does not tell (proc(5))."""
    try:
        lines = status.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("VmHWM:")), None)
    return int(found[1]) * 1024 if found else None
