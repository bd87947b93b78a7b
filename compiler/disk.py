"""Room on disks, asked for before it is needed: a compile of hours shall not end with a full one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc.compiler.errors import LlmcError
from llmc.compiler.report.text import scaled
from llmc.passes.graph import Graph, Weights, clone, constant_bytes, constants, is_large, linked_file

LEAST = 16
"""Weights shrink to no less than this part of themselves: 32 bits become 2, in codebooks."""


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def free_bytes(place: Path) -> int:
    """Bytes that this process may still write where `place` is, or will be."""
    about = os.statvfs(nearest_existing(place))
    return about.f_frsize * (about.f_bfree if os.geteuid() == 0 else about.f_bavail)


def same_disk(one: Path, other: Path) -> bool:
    """Whether the two places are, or will be, on one file system."""
    return nearest_existing(one).stat().st_dev == nearest_existing(other).stat().st_dev


def is_full(error: OSError) -> bool:
    """Whether it says that a disk, or a quota on it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def check_least(graphs: Iterable[Graph], output: Path, linked: frozenset[Path] = frozenset()) -> None:
    """Raises LlmcError where the disk of `output` cannot hold these graphs, whatever passes make of their weights."""
    needed = sum(bytes_to_write(graph, output, linked) for graph in graphs) // LEAST
    _check(output, needed, f"needs {scaled(needed, 'B')} or more")


def check_room(graphs: Iterable[Graph], output: Path, linked: frozenset[Path] = frozenset()) -> None:
    """Raises LlmcError where the disk of `output` cannot hold these graphs; weights in `linked` files take no room."""
    needed = sum(bytes_to_write(graph, output, linked) for graph in graphs)
    _check(output, needed, f"needs {scaled(needed, 'B')} for its weights")


def bytes_to_write(graph: Graph, output: Path, linked: frozenset[Path] = frozenset()) -> int:
    """Of the weights; without those in `linked` files, and in files that share their blocks with copies at `output`."""
    shared, total = dict[Path, bool](), 0
    for constant in constants(graph):
        held = constant._values
        region = held.region() if isinstance(held, Weights) else None
        if region is not None and region.path not in shared:
            shared[region.path] = is_large(graph) and _shares(region.path, output)
        stays = linked_file(held, linked) is not None or (region is not None and shared[region.path])
        total += 0 if stays else constant_bytes(constant)
    return total


@contextmanager
def probe_beside(output: Path) -> Iterator[Path]:
    """A name on the disk of `output` for a file to try something with, which is gone afterwards."""
    probe = nearest_existing(output.parent) / f".{output.name}.probe-{os.getpid():07}"
    probe.unlink(missing_ok=True)
    try:
        yield probe
    finally:
        probe.unlink(missing_ok=True)


def _shares(source: Path, output: Path) -> bool:
    """Whether the disk of `output` would hold a copy of this file without room for its blocks."""
    with probe_beside(output) as probe:
        return clone(source, probe)


def _check(output: Path, needed: int, need: str) -> None:
    free = free_bytes(output.parent)
    if needed > free:
        raise LlmcError(
            f"{output} {need}, and its disk has {scaled(free, 'B')} free: free some (`llmc cache ls` says what the "
            "cache takes), or choose another disk with -o"
        )
