from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmc.compiler.cache import DEFAULT_LIMIT, limit_of, open_store, place
from llmc.compiler.cli import app
from llmc.compiler.errors import LlmcError


def test_where_the_cache_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("LLMC_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert place() == Path("/home/me/mine")
    monkeypatch.delenv("LLMC_CACHE")
    assert place() == Path("/fast/llmc")
    for ignored in ("", "relative"):  # XDG Base Directory Specification: must be absolute
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert place() == Path("/home/me/.cache/llmc")


def test_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limit_of() == DEFAULT_LIMIT
    monkeypatch.setenv("LLMC_CACHE_LIMIT", "2GiB")
    assert limit_of() == 2 << 30
    assert limit_of("5MB", "--limit") == 5_000_000
    monkeypatch.setenv("LLMC_CACHE_LIMIT", "many")
    with pytest.raises(LlmcError, match="LLMC_CACHE_LIMIT: should be a number of bytes, or one with a unit"):
        limit_of()
    with pytest.raises(LlmcError, match="--limit: should be a number"):
        limit_of("x", "--limit")


def test_a_place_that_cannot_be_written_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", "/proc/llmc")
    with pytest.raises(LlmcError, match=r"the cache at /proc/llmc/v1 cannot be used: .*; set LLMC_CACHE"), open_store():
        pass


def call(*words: str) -> Any:
    done = CliRunner().invoke(app, ["cache", *words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_commands() -> None:
    with open_store() as store:
        store.keep("load", "ab" * 32, {}, [store.add(b"x" * 1000)])
    listed = call("ls")
    assert listed["kinds"][0] | {"last_use": 0} == {
        "name": "load",
        "entries": 1,
        "bytes": listed["bytes"],
        "last_use": 0,
    }
    assert 1000 < listed["bytes"] < 1300
    assert call("gc")["entries"] == 0
    assert call("gc", "--limit", "1KB")["entries"] == 1
    with open_store() as store:
        store.keep("load", "ab" * 32, {})
    assert call("clear")["entries"] == 1
    assert call("ls")["bytes"] == 0
