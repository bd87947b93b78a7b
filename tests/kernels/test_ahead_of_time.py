"""Every kernel as it is shipped, compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.passes.graph import KERNELS

OPERATORS = sorted(path.parent.name for path in KERNELS.glob("*/kernel.py"))


def stacks(cache: Path, *arguments: str) -> dict[str, list[int]]:
    """Kernel → bytes of stack on each GPU that has it, by tests/bench/kernels.py."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    program = Path(__file__).parents[1] / "bench" / "kernels.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(program), *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if re.match(r"\| \w+, ", line)]
    return {name: [int(cell.split(" / ")[2]) for cell in cells if cell != "-"] for name, *cells in rows}


def test_a_kernel_is_compiled_without_a_gpu(tmp_path: Path) -> None:
    assert set(map(tuple, stacks(tmp_path, "--operator", "swiglu_quantize", "--sm", "80").values())) == {(0,), ()}


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_kernel_spills_registers(operator: str, tmp_path: Path) -> None:
    found = stacks(tmp_path, "--operator", operator)
    assert found
    assert {name: sizes for name, sizes in found.items() if any(sizes) or len(sizes) < 3} == {}
