"""`--time-passes`: every second of the compile is in one row."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmc.compiler.report import Timings
from llmc.compiler.report.times import render, rows

TIMINGS = Timings(
    total=10.0,
    steps={"load": 2.0, "verify": 4.0, "1 fuse-gelu": 1.0, "build": 2.5},
    verification={"load": 1.5, "1 fuse-gelu": 2.5},
)


def test_verification_stands_beside_its_step() -> None:
    assert rows(TIMINGS) == [
        ("load", 2.0, 1.5),
        ("1 fuse-gelu", 1.0, 2.5),
        ("build", 2.5, 0.0),
        ("other", pytest.approx(0.5), 0.0),
    ]


def test_rows_sum_to_the_total() -> None:
    assert sum(own + verification for _, own, verification in rows(TIMINGS)) == pytest.approx(TIMINGS.total)


def test_a_cached_step_is_marked() -> None:
    stream = io.StringIO()
    render(TIMINGS.model_copy(update={"cached": ["1 fuse-gelu"]}), Console(file=stream, width=80))
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()[2:4]] == ["1 fuse-gelu (cached)", "build"]


def test_the_table() -> None:
    stream = io.StringIO()
    render(TIMINGS, Console(file=stream, width=80))
    assert [line.split() for line in stream.getvalue().splitlines()[1:]] == [
        ["load", "2.000", "20.0", "1.500", "15.0"],
        ["1", "fuse-gelu", "1.000", "10.0", "2.500", "25.0"],
        ["build", "2.500", "25.0"],
        ["other", "0.500", "5.0"],
        ["total", "10.000", "100.0", "4.000", "40.0"],
    ]
