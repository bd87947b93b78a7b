from __future__ import annotations

import subprocess
import sys

import pytest

from llmc.passes.base import discover, find


@pytest.mark.parametrize("key", discover())
def test_a_pass_is_found_by_its_key(key: str) -> None:
    assert find(key) is discover()[key]


@pytest.mark.parametrize(
    "key", ["", "fuse-gelus", "fuse_gelu", "evaluate", "convert-half", "graph", "../base", "fuse.fuse-gelu"]
)
def test_what_is_no_key_finds_nothing(key: str) -> None:
    assert key not in discover()
    assert find(key) is None


def test_finding_a_pass_imports_no_other() -> None:
    program = (
        "import sys; from llmc.passes.base import find; find('eliminate-dead')\n"
        "print(*(name for name in sys.modules if name.startswith(('llmc.passes.fuse.', 'llmc.passes.precision.'))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
