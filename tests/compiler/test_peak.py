"""The most memory that a process had, by what the system counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmc.compiler.peak import peak_bytes

WORK = """
from llmc.compiler.peak import peak_bytes
before = peak_bytes()
held = bytearray(b"x") * (64 << 20)
del held
print(before, peak_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_was_given_back_counts() -> None:
    told = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True).stdout
    before, after = map(int, told.split())
    assert 56 << 20 < after - before < 72 << 20  # the interpreter held a few MB less, or more, than at its peak before


def test_nothing_is_said_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert peak_bytes(tmp_path / "none") is None
    (tmp_path / "status").write_text("Name: x\n")
    assert peak_bytes(tmp_path / "status") is None


@pytest.mark.skipif(sys.platform != "linux", reason="what is anonymous is told by Linux")
def test_garbage_and_free_memory_go_back_to_the_system() -> None:
    code = """
import gc
from llmc.compiler.peak import give_back
def anonymous():
    lines = open('/proc/self/status').read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith('RssAnon')))
gc.disable()
class Node:
    pass
before = anonymous()
for _ in range(1000):
    node = Node()
    node.me, node.held = node, bytearray(50_000)
del node
held = anonymous()
give_back()
print(before, held, anonymous())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, held, after = map(int, done.stdout.split())
    assert held - before > 40_000, "50 MB of garbage"
    assert after - before < 10_000
