"""What is drawn from a report before it is rendered."""

from __future__ import annotations

import io
import math

from rich.console import Console

from llmc.compiler.report import (
    LayerPrecision,
    NearMissLine,
    OutputNumerics,
    PassReport,
    Report,
    html,
    markdown,
    summary,
    terminal,
)


def numerics(max_abs: float, cosine: float) -> OutputNumerics:
    return OutputNumerics(output="y", max_abs=max_abs, relative_l2=0.0, cosine=cosine, sqnr_db=None, finite=True)


def test_the_worst_of_a_step() -> None:
    step = PassReport(index=1, key="p", numerics=[numerics(1e-3, 0.9), numerics(2e-3, 0.99)])
    assert (summary.worst_max_abs(step), summary.worst_cosine(step)) == (2e-3, 0.9)


def test_nan_is_worse_than_any_number() -> None:
    step = PassReport(index=1, key="p", numerics=[numerics(math.nan, 0.9), numerics(2e-3, math.nan)])
    furthest, cosine = summary.worst_max_abs(step), summary.worst_cosine(step)
    assert furthest is not None
    assert math.isnan(furthest)
    assert cosine is not None
    assert math.isnan(cosine)


def test_a_step_that_was_not_compared_has_no_worst() -> None:
    step = PassReport(index=1, key="p")
    assert (summary.worst_max_abs(step), summary.worst_cosine(step)) == (None, None)


def test_near_misses_of_one_cause_stand_together(report: Report) -> None:
    report.passes[1].near_misses = [
        NearMissLine(rule="A", node="n1", reason="x"),
        NearMissLine(rule="B", node="n2", reason="y", module="m"),
        NearMissLine(rule="B", node="n3", reason="y"),
    ]
    groups = summary.near_misses(report)
    assert [(g.rule, g.reason, len(g.places), g.first_place) for g in groups] == [
        ("B", "y", 2, "m"),
        ("A", "x", 1, "n1"),
    ]


def test_precision_starts_with_what_was_not_given() -> None:
    def layer(op: str, asked: str, found: str) -> LayerPrecision:
        return LayerPrecision(node="n", op=op, asked=asked, found=found)

    layers = [layer("Conv", "int8", "int8")] * 3 + [layer("MatMul", "int8", "float16"), layer("MatMul", "int8", "int8")]
    groups = summary.precision_groups(layers)
    assert [(g.asked, g.found, g.operators, g.as_asked) for g in groups] == [
        ("int8", "float16", {"MatMul": 1}, False),
        ("int8", "int8", {"Conv": 3, "MatMul": 1}, True),
    ]


def test_times_are_found_by_number_or_by_name(report: Report) -> None:
    assert [summary.step_time(report, step) for step in report.passes] == ["19.4 s", "0.16 s", ""]


def test_what_was_cached_has_no_time_of_its_own(report: Report) -> None:
    report.timings.cached = ["load", "1 fuse-gelu", "build"]
    assert [summary.step_time(report, step) for step in report.passes] == ["cached", "cached", ""]
    console = Console(file=io.StringIO(), width=160)
    terminal.render(report, console)
    for page in (html.render(report), markdown.render(report), console.file.getvalue()):  # type: ignore[attr-defined]
        assert "cached" in page
        assert "0.16 s" not in page
        assert "19.4 s" not in page
        assert "41.2 s" in page  # of the whole compile


def test_operator_changes_have_both_sides() -> None:
    assert summary.operator_changes({"Mul": 2, "Erf": 1}, {"Gelu": 5, "Mul": 2}) == [
        ("Gelu", 0, 5),
        ("Mul", 2, 2),
        ("Erf", 1, 0),
    ]
