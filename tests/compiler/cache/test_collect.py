from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from llmc.compiler.cache import collect
from llmc.compiler.cache.store import Store

BLOB = 10_000
RECORD = 200
"""Bytes, more than a record takes that has one blob, and less than a blob."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path, 1 << 30)
    store.open()
    yield store
    store.close()


def fill(store: Store, *names: str, kind: str = "pass") -> dict[str, str]:
    """A record with a blob of its own for each name, the first one used longest ago."""
    blobs = {name: store.add(name.encode() * (BLOB // len(name))) for name in names}
    for age, (name, blob) in enumerate(reversed(blobs.items())):
        store.keep(kind, name * 16, {}, [blob])
        for path in (store.path(blob), store._record(kind, name * 16)):
            os.utime(path, (1000 - age, 1000 - age))
    return blobs


def held(store: Store, *names: str, kind: str = "pass") -> list[str]:
    return [name for name in names if store._record(kind, name * 16).is_file()]


def test_the_least_recently_used_goes_first_with_its_blobs(store: Store) -> None:
    fill(store, "aaaa", "bbbb", "cccc")
    removed = collect.collect(store, 2 * (BLOB + RECORD))
    assert held(store, "aaaa", "bbbb", "cccc") == ["bbbb", "cccc"]
    assert removed.entries == 1
    assert BLOB < removed.bytes < BLOB + RECORD
    assert removed.bytes_left == 2 * BLOB
    assert collect.survey(store).bytes <= 2 * (BLOB + RECORD)


def test_a_use_makes_an_entry_young_again(store: Store) -> None:
    fill(store, "aaaa", "bbbb", "cccc")
    store.find("pass", "aaaa" * 16)
    collect.collect(store, 2 * (BLOB + RECORD))
    assert held(store, "aaaa", "bbbb", "cccc") == ["aaaa", "cccc"]


def test_nothing_older_is_kept_in_the_room_that_is_left(store: Store) -> None:
    """Else a large entry in the middle would go and small ones used long before it stay."""
    fill(store, "aaaa", "bbbb")
    store.keep("pass", "dddd" * 16, {})
    os.utime(store._record("pass", "dddd" * 16), (10, 10))
    collect.collect(store, BLOB + 2 * RECORD)
    assert held(store, "aaaa", "bbbb", "dddd") == ["bbbb"]


def test_a_blob_that_a_younger_record_shares_stays(store: Store) -> None:
    blobs = fill(store, "aaaa")
    store.keep("build", "eeee" * 16, {}, [blobs["aaaa"]])
    collect.collect(store, BLOB + RECORD)
    assert held(store, "aaaa") == []
    assert store.blob(blobs["aaaa"]).is_file()


def test_blobs_that_nothing_refers_to_go(store: Store) -> None:
    """As a process leaves them that is killed between its blobs and the record."""
    lost = store.add(b"lost")
    os.utime(store.path(lost), (1000, 1000))
    assert [(kind.name, kind.entries, kind.bytes) for kind in collect.survey(store).kinds] == [("unused", 1, 4)]
    assert collect.collect(store, 1 << 30).bytes == 4
    assert collect.survey(store).kinds == ()


def test_what_a_running_process_uses_stays(store: Store, tmp_path: Path) -> None:
    fill(store, "aaaa", "bbbb")
    running = Store(tmp_path, 1 << 30)
    running.open()
    found = running.find("pass", "aaaa" * 16)
    fresh = running.add(b"not referred to yet")
    removed = collect.collect(store, 0)
    assert removed.running == 1
    assert found is not None
    assert running.blob(found.blobs[0]).is_file()
    assert running.blob(fresh).is_file()
    assert held(store, "aaaa", "bbbb") == ["aaaa"]
    running.close()
    assert collect.collect(store, 0).bytes_left == 0


def test_a_damaged_record_is_removed(store: Store) -> None:
    fill(store, "aaaa", "bbbb")
    store._record("pass", "aaaa" * 16).write_bytes(b"x")
    assert [kind.entries for kind in collect.survey(store).kinds if kind.name == "pass"] == [1]


def test_a_survey_in_a_terminal(store: Store) -> None:
    fill(store, "aaaa", "bbbb", kind="load")
    console = Console(file=io.StringIO(), width=100)
    collect.render(collect.survey(store), console)
    collect.render_removed(collect.collect(store, 0), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[1].split()[:4] == ["load", "2", "20.3", "kB"]
    assert lines[2] == f"20.3 kB of 1.07 GB in {store.root}"
    assert lines[3] == "removed 2 entries, 20.3 kB; 0 B left"
