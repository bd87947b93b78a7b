"""A limit on the memory of a process and its children, page cache included: by control groups, as the system has
them."""

from __future__ import annotations

import atexit
import os
import shutil
from pathlib import Path
from typing import Protocol

V1 = Path("/sys/fs/cgroup/memory")
"""Where the memory controller of cgroups version 1 stands."""


class Limit(Protocol):
    """A limit that commands can be run inside."""

    def command(self, command: list[str]) -> list[str]:
        """The command that runs `command` inside."""


class GroupLimit:
    """A group of cgroups version 1, entered by a shell that becomes the command."""

    def __init__(self, size: int) -> None:
        self.place = V1 / f"llmc-bench-{os.getpid()}"
        self.place.mkdir(exist_ok=True)
        atexit.register(self.place.rmdir)
        (self.place / "memory.limit_in_bytes").write_text(str(size))

    def command(self, command: list[str]) -> list[str]:
        return ["sh", "-c", f'echo $$ > {self.place}/cgroup.procs; exec "$@"', "sh", *command]


class SystemdLimit:
    """A scope of systemd, which knows cgroups version 2."""

    def __init__(self, size: int) -> None:
        self.size = size

    def command(self, command: list[str]) -> list[str]:
        scope = ["systemd-run", "--quiet", "--scope", *([] if os.geteuid() == 0 else ["--user"])]
        return [*scope, "-p", f"MemoryMax={self.size}", "-p", "MemorySwapMax=0", *command]


def find_limit(size: int) -> Limit | None:
    """A limit of `size` bytes; None for 0, and where none can be set."""
    if not size:
        return None
    if os.access(V1 / "memory.limit_in_bytes", os.R_OK) and os.access(V1, os.W_OK):
        return GroupLimit(size)
    if shutil.which("systemd-run") and Path("/run/systemd/system").is_dir():
        return SystemdLimit(size)
    return None
