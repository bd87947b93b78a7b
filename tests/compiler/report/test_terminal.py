"""The terminal: 100 columns, names as they are, warnings where they are seen."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.ansi import AnsiDecoder
from rich.console import Console

from llmc.compiler.report import EngineReport, ModelReport, Report, terminal
from llmc.compiler.report.text import printable


def console(width: int = 100, colours: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=colours, color_system="standard" if colours else None), out


def shown(report: Report, width: int = 100) -> list[str]:
    screen, out = console(width)
    terminal.render(report, screen, Path("build/x"))
    return out.getvalue().splitlines()


def test_the_facts_are_said(report: Report) -> None:
    lines = [" ".join(line.split()) for line in shown(report)]
    assert "✓ load 21 4 kB 0.999980 2.0e-03 19.4 s" in lines
    assert "✓ fuse-gelu 21 → 12 1 3 4 kB 0.999980 2.0e-03 0.16 s" in lines
    assert "– eliminate-dead: encoder.layer.0/MatMul_1" in lines
    assert "float16, asked int8 1 layer 1 MatMul" in lines
    assert "Assignments that fuse-gelu measured" in lines
    assert "2 of 3 layers 5 kB of weights, time 0.50, cosine 0.999500 (≥ 0.999000) ← chosen" in lines
    assert "Clipped most by fuse-gelu" in lines
    assert "0.12 % encoder.layer.0/MatMul_1 beyond 1.27, up to 1.9" in lines
    assert not any("2.54" in line for line in lines), "nothing says that it saturates"
    assert "bytes activation 9.44 MB" in lines
    assert any(line.endswith("✓ done in 41.2 s") for line in lines)


def test_warnings_come_last_and_once(report: Report) -> None:
    report.warnings.append("pass encoder.layer.0/MatMul_1")
    lines = [line.strip() for line in shown(report)]
    start = lines.index("3 warnings")
    assert lines[start + 1 :] == [
        "!  encoder.layer.0/MatMul_1",
        "!  pass encoder.layer.0/MatMul_1",
        "!  tensorrt-rtx: target encoder.layer.0/MatMul_1",
    ]
    assert any("build/x/report.html" in line for line in lines[:start])


def test_many_warnings_are_cut(report: Report) -> None:
    report.warnings = [f"warning {index}" for index in range(40)]
    lines = [line.strip() for line in shown(report)]
    assert lines[-1] == "and 30 more in the report"
    assert "42 warnings" in lines


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_lines_fit(width: int, report: Report) -> None:
    assert max(len(line) for line in shown(report, width)) <= min(width, 100)


@pytest.mark.parametrize("width", [80, 100])
def test_passes_are_named_in_full(width: int, report: Report) -> None:
    assert sum("eliminate-dead " in line for line in shown(report, width)) == 1


def test_names_are_not_markup(hostile: tuple[str, Report]) -> None:
    name, report = hostile
    lines = shown(report, 100)
    assert printable(name) in " ".join(lines)
    assert "\x1b" not in "".join(lines)


def test_names_do_not_colour_the_screen(hostile: tuple[str, Report]) -> None:
    """With colours on, what is left without the escapes that rich wrote is what a plain screen shows."""
    _, report = hostile
    screen, out = console(colours=True)
    terminal.render(report, screen, Path("build/x"))
    assert [line.plain for line in AnsiDecoder().decode(out.getvalue().rstrip("\n"))] == shown(report)


def test_a_model(report: Report) -> None:
    screen, out = console()
    terminal.render_model(ModelReport(file="m.onnx", graph=report.graph, precision=report.precision), screen)
    text = " ".join(out.getvalue().split())
    assert text.startswith("m.onnx opset 20")
    assert "12: 6 Mul, 3 Gelu, 3 encoder.layer.0/MatMul_1" in text


def test_an_engine() -> None:
    screen, out = console()
    header: dict[str, object] = {"version": "1.7.1.116", "compute_capabilities": (80, 89), "weights_bytes": 45_000_000}
    terminal.render_engine(EngineReport(file="m.engine", bytes=46_812_352, header=header), screen)
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert lines[0] == "m.engine 46.8 MB"
    assert {"version 1.7.1.116", "compute capabilities 80, 89", "weights 45 MB"} <= set(lines)
