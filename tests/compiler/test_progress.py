"""What is said of long work: how often, and that the numbers are right."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llmc.compiler import progress
from llmc.compiler.digest import digests_of, sha256
from llmc.compiler.progress import Counted


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def test_tells_bytes_pieces_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(monkeypatch), list[str]()
    told = Counted(said.append, "writing", 10_000_000_000, 1200, "weight")
    for name, count, seconds in (("a", 1_000_000_000, 2), ("a", 1_000_000_000, 2), ("b", 500_000_000, 96)):
        clock.now += seconds
        told(name, count)
    assert said == [
        "writing",
        "writing: 1 GB of 10 GB, weight 1 of 1,200, 18 s left",
        "writing: 2 GB of 10 GB, weight 1 of 1,200, 16 s left",
        "writing: 2.5 GB of 10 GB, weight 2 of 1,200, 5 min 0 s left",
    ]


def test_short_work_is_only_named_and_long_work_told_at_most_twice_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(monkeypatch), list[str]()
    told = Counted(said.append, "reading", 1000, 1, "file")
    for _ in range(4):
        clock.now += 0.1
        told("a", 1)
    assert said == ["reading"]
    for _ in range(40):
        clock.now += 0.1
        told("a", 1)
    assert 2 <= len(said) <= 10


def test_digests_are_those_of_hashlib_and_every_byte_is_told(tmp_path: Path) -> None:
    content = {"b": b"x" * 3_000_001, "a": b"", "c": b"abc"}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    counts = list[int]()
    assert sha256(tmp_path / "b", counts.append) == hashlib.sha256(content["b"]).hexdigest()
    assert sum(counts) == len(content["b"])
    found = digests_of({name: tmp_path / name for name in content}, "digesting")
    assert list(found.items()) == [(name, hashlib.sha256(content[name]).hexdigest()) for name in "abc"]


def test_nothing_is_shown_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    progress.error_console.cache_clear()
    with progress.shown() as told:
        told("loading")
    progress.error_console.cache_clear()
    assert capfd.readouterr() == ("", "")
