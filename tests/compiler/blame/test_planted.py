"""Faults at random places of real models: bisection must name the rewrite and the layer, each time.

Nothing gives a fault away but the numbers: the wrong pass has the same name with and without it, and leaves the names
and the operators that the right one leaves.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.blame import bisect
from llmc.compiler.blame.reproducer import reproduce

from .conftest import ALLOWED, FAULTS

SAMPLE = ("tanh-gelu", "overflow", "bad-scale")


def check(case: Any, place: Path) -> None:
    budget = {"relative_l2": ALLOWED * case.sound_error}
    found = bisect(case.plan, place, budget=budget)
    assert found.status == "broken", found.points[-1].numerics
    guilty, part = found.guilty, found.reproducer
    assert guilty is not None
    assert part is not None
    assert (guilty.number, guilty.node, guilty.module) == (case.number, case.node, case.module)
    assert found.appears is not None
    assert f"{case.module}.".startswith(f"{found.appears.module}.")  # of what was merged, the module that holds all
    assert re.search(r"\.\d+\b", found.appears.module), "names a layer"
    assert (found.not_finite.tensor if found.not_finite else "") == case.overflows
    assert len(found.points) <= 4 + found.rewrites.bit_length()  # both ends, and once each for passes and for rewrites
    assert part.nodes_before <= part.nodes_of_graph / 4
    assert reproduce(place / "reproducer").breaches
    shutil.copy(place / "reproducer/before.onnx", place / "reproducer/after.onnx")
    assert not reproduce(place / "reproducer").breaches


@pytest.mark.parametrize("fault", SAMPLE)
def test_a_planted_fault_is_found(fault: str, planted: Callable[..., Any], tmp_path: Path) -> None:
    check(planted("bert", fault, seed=0), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("model", "fault"), [(model, fault) for model, faults in FAULTS.items() for fault in faults])
def test_sixty_planted_faults_are_found(
    model: str, fault: str, seed: int, planted: Callable[..., Any], tmp_path: Path
) -> None:
    check(planted(model, fault, seed, "base"), tmp_path / "out")
