"""What the cache holds, and making room in it: least recently used first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.compiler.cache.store import Store, parse_record
from llmc.compiler.report.text import scaled

if TYPE_CHECKING:
    from rich.console import Console

_NEVER = 1 << 63
"""Later than any time."""


@dataclass(frozen=True)
class Kind:
    """All records of one kind."""

    name: str
    entries: int
    bytes: int
    """Of the records and their blobs; a blob that others share counts for the kind that used it last."""
    last_use: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Survey:
    """All that the cache holds."""

    place: str
    bytes: int
    limit: int
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Removed:
    """What a collection removed, and what it left."""

    entries: int
    bytes: int
    bytes_left: int
    running: int
    """Other processes that use the cache now: what they use stays."""


@dataclass(frozen=True)
class _Entry:
    path: Path
    kind: str
    blobs: tuple[str, ...]
    size: int
    last_use: int
    """Nanoseconds since 1970, as for what is compared with it."""


def survey(store: Store) -> Survey:
    """What the cache holds, by kind; blobs that nothing refers to any more are of the kind 'unused'."""
    kinds = _kinds(store)
    return Survey(str(store.root), sum(kind.bytes for kind in kinds), store.limit, kinds)


def render(found: Survey, console: Console) -> None:
    """Print a survey."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("Kind", "Entries", "Size", "Last used"):
        table.add_column(heading, justify="left" if heading == "Kind" else "right")
    for kind in found.kinds:
        used = f"{datetime.fromtimestamp(kind.last_use, UTC).astimezone():%Y-%m-%d %H:%M}" if kind.last_use else ""
        table.add_row(kind.name, str(kind.entries), scaled(kind.bytes, "B"), used)
    console.print(table)
    total = f"{scaled(found.bytes, 'B')} of {scaled(found.limit, 'B')} in {found.place}"
    console.print(total, markup=False, highlight=False, soft_wrap=True)


def render_removed(removed: Removed, console: Console) -> None:
    """Print what a collection did."""
    line = f"removed {removed.entries} entries, {scaled(removed.bytes, 'B')}; {scaled(removed.bytes_left, 'B')} left"
    if removed.running:
        line += f" (what {removed.running} running processes use stays)"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _kinds(store: Store) -> tuple[Kind, ...]:
    sizes = {path.name: path.stat().st_size for path in _files(store.root / "blobs")}
    found: dict[str, list[tuple[int, int]]] = {}
    for entry in _entries(store):
        found.setdefault(entry.kind, []).append(
            (entry.size + sum(sizes.pop(blob, 0) for blob in entry.blobs), entry.last_use)
        )
    if sizes:
        found["unused"] = [(size, 0) for size in sizes.values()]
    return tuple(
        Kind(name, len(entries), sum(size for size, _ in entries), max(used for _, used in entries) / 1e9)
        for name, entries in sorted(found.items())
    )


def collect(store: Store, limit: int) -> Removed:
    """Remove records and blobs until what is left takes at most `limit` bytes.

    What has been used since the oldest other live process began stays, whatever it takes.
    """
    with store.locked(exclusive=True):
        begun = store.other_sessions()
        safe = min(begun, default=_NEVER)
        sizes = {path.name: path.stat().st_size for path in _files(store.root / "blobs")}
        kept: set[str] = set()
        total = removed = freed = 0
        for entry in _entries(store):
            size = entry.size + sum(sizes.get(blob, 0) for blob in entry.blobs if blob not in kept)
            if entry.last_use >= safe or total + size <= limit:
                total += size
                kept.update(entry.blobs)
            else:
                limit = total  # what was used longer ago goes too
                removed, freed = removed + 1, freed + entry.size
                entry.path.unlink()
        for path in _files(store.root / "blobs"):
            if path.name not in kept and path.stat().st_mtime_ns < safe:
                freed += sizes.pop(path.name, 0)
                path.unlink()
    return Removed(removed, freed, sum(sizes.values()), len(begun))


def _entries(store: Store) -> Iterator[_Entry]:
    """Every record, the last used first; a damaged one is removed."""
    found = []
    for path in _files(store.root / "records"):
        record = parse_record(path.read_bytes())
        if record is None:
            store.drop(path, "record")
            continue
        about = path.stat()
        found.append(_Entry(path, path.parents[1].name, record.blobs, about.st_size, about.st_mtime_ns))
    yield from sorted(found, key=lambda entry: (-entry.last_use, entry.path.name))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
