from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmc.compiler.cache.store import DamagedError, FullError, Store, copy

KEY = "ab" * 32
HELD = """
import os, signal, sys
from pathlib import Path
from llmc.compiler.cache.store import Store
store = Store(Path(sys.argv[1]), 1 << 30)
store.open()
(store._session / "half").write_bytes(b"x" * 1000)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path, 1 << 30)
    store.open()
    yield store
    store.close()


def files(store: Store, folder: str) -> list[Path]:
    return sorted(path for path in (store.root / folder).rglob("*") if path.is_file())


def test_a_record_comes_back_with_its_blobs(store: Store) -> None:
    digest = store.add(memoryview(b"onetwo"))
    assert digest == hashlib.sha256(b"onetwo").hexdigest()
    store.keep("pass", KEY, {"infinite": float("inf"), "list": [1, "x"]}, [digest])
    found = store.find("pass", KEY)
    assert found is not None
    assert found.value == {"infinite": float("inf"), "list": [1, "x"]}
    assert [store.blob(blob).read_bytes() for blob in found.blobs] == [b"onetwo"]
    assert store.find("pass", "cd" * 32) is None
    assert store.find("load", KEY) is None


def test_equal_bytes_are_kept_once(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"same")
    assert store.add(b"same") == store.add_file(tmp_path / "file") == store.add(memoryview(b"same"))
    assert len(files(store, "blobs")) == 1


def test_blocks_are_kept_as_one(store: Store) -> None:
    whole = bytes(range(250))
    digest = store.add_blocks((whole[i : i + 100] for i in range(0, 250, 100)), len(whole))
    assert digest == hashlib.sha256(whole).hexdigest() == store.add(whole)
    assert store.blob(digest).read_bytes() == whole
    with pytest.raises(FullError):
        store.add_blocks(iter([b""]), store.limit)


def test_any_byte_of_a_record_that_changes_is_noticed(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.keep("pass", KEY, {"a": 1})
    (path,) = files(store, "records")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with caplog.at_level(logging.WARNING):
            assert store.find("pass", KEY) is None
        assert not path.exists()
        assert f"pass record of the cache is damaged and was dropped: {path}" in caplog.messages[-1]
    path.write_bytes(whole[:-1])
    assert store.find("pass", KEY) is None
    path.write_bytes(b"")
    assert store.find("pass", KEY) is None


def test_a_damaged_blob_is_dropped_and_its_record_with_it(store: Store, tmp_path: Path) -> None:
    digest = store.add(b"bytes")
    store.keep("pass", KEY, {}, [digest])
    other = Store(tmp_path, 1 << 30)  # another process, which has not verified it yet
    other.open()
    (path,) = files(store, "blobs")
    path.write_bytes(b"Bytes")
    with pytest.raises(DamagedError, match="is damaged"):
        other.blob(digest)
    assert not path.exists()
    assert other.find("pass", KEY) is None
    with pytest.raises(DamagedError, match="has vanished"):
        other.blob(digest)
    assert other.add(b"bytes") == digest  # made anew
    assert other.blob(digest).read_bytes() == b"bytes"
    other.close()


def test_no_more_is_written_than_the_limit(tmp_path: Path) -> None:
    store = Store(tmp_path, 100)
    store.open()
    store.add(b"x" * 60)
    for write in (lambda: store.add(b"y" * 41), lambda: store.keep("pass", KEY, {"text": "z" * 41})):
        with pytest.raises(FullError, match="more than the limit of 100 bytes"):
            write()
    store.add(b"y" * 40)
    assert len(files(store, "blobs")) == 2
    assert [path.name for path in files(store, "sessions")] == ["lock"]
    store.close()


def test_what_a_killed_process_left_goes_and_what_a_live_one_has_stays(tmp_path: Path) -> None:
    def start(how: str) -> subprocess.Popen[bytes]:
        program = [sys.executable, "-c", HELD, str(tmp_path), how]
        return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    with start("killed") as killed:
        assert killed.wait() == -9
    (left,) = (tmp_path / "v1/sessions").glob("*/half")
    with start("lives") as live:
        assert live.stdout is not None
        assert live.stdout.readline() == b"open\n"
        assert not left.exists()
        store = Store(tmp_path, 1)
        store.open()
        assert len(list((tmp_path / "v1/sessions").glob("*/half"))) == 1
        store.close()
        live.communicate(b"")
    store.open()
    assert len(list((tmp_path / "v1/sessions").iterdir())) == 1  # its own
    store.close()
    assert list((tmp_path / "v1/sessions").iterdir()) == []


def test_many_write_and_read_the_same_entries_at_once(tmp_path: Path) -> None:
    def work(worker: int) -> None:
        store = Store(tmp_path, 1 << 30)
        store.open()
        for number in range(40):
            key = hashlib.sha256(bytes([number])).hexdigest()
            found = store.find("pass", key)
            if found is None:
                store.keep("pass", key, {"number": number}, [store.add(bytes([number]) * 5000)])
                found = store.find("pass", key)
            assert found is not None, worker
            assert found.value == {"number": number}
            assert store.blob(found.blobs[0]).read_bytes() == bytes([number]) * 5000
        store.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(list((tmp_path / "v1/blobs").glob("*/*"))) == 40


def test_a_copy_has_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_001))
    copy(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
