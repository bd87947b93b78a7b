"""Weights that stay in the source's file: the artifact has a second name of it, or a clone that shares its blocks."""

from __future__ import annotations

import fcntl
from pathlib import Path

_FICLONE = 0x40049409
"""ioctl_ficlone(2): of btrfs, XFS and others."""


def clone(source: Path, target: Path) -> bool:
    """Make `target`, a new file, share all blocks of `source`; False, and no file, where the file system cannot."""
    try:
        with source.open("rb") as read, target.open("xb") as write:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True
