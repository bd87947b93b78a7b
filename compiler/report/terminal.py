"""Reports in a terminal: what happened, in 100 columns. Names come from models, so none is read as rich markup."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from llmc.compiler.report import (
    EngineReport,
    GraphReport,
    LayerPrecision,
    ModelReport,
    PassReport,
    Report,
    TargetReport,
    TensorLine,
    summary,
    text,
)

WIDTH = 100
ALL_COLUMNS_FROM = 90
"""Columns of a terminal that has room for the whole table of passes."""
NEAR_MISSES_SHOWN = 6
OPERATORS_SHOWN = 8
SATURATED_SHOWN = 3
WARNINGS_SHOWN = 12
LABELS = 22
"""Columns of the labels, so that all sections line up."""

_FAILED = ("✗", "bold red")
_STATUS = {
    "done": ("✓", "green"),
    "skipped": ("–", "dim"),
    "rolled back": ("↩", "bold yellow"),
    "over budget": _FAILED,
    "crashed": _FAILED,
}
_RESULT = {
    "done": ("✓ done", "bold green"),
    "rolled back": ("↩ done, rewrites left out", "bold yellow"),
    "over budget": ("✗ over budget", "bold red"),
    "crashed": ("✗ crashed", "bold red"),
    "fell back": ("✗ fell back", "bold red"),
}


def render(report: Report, console: Console, folder: Path | None = None) -> None:
    """Print a report; `folder` is where its files lie, for the paths at the end."""
    if report.encoder is not None:
        render(report.encoder, console)
    parts = [
        _header(report),
        _passes(report, console.width),
        _reasons(report),
        *(_facts(f"Assignments that {step.key} measured", _frontier(step)) for step in report.passes),
        *(_facts(f"Clipped most by {step.key}", _saturated(step)) for step in report.passes),
        _facts("Near misses", _near_misses(report)),
        _facts("Graph", _graph(report.graph)),
        _facts("Precision", _precision(report.precision)),
        _facts("Verified", _verification(report)),
        _facts(f"Target {report.target.kind}", _built(report)) if report.target else None,
        _files(report, folder),
        _warnings(report),
    ]
    _print(console, parts)


def render_model(report: ModelReport, console: Console) -> None:
    """Print what an ONNX model holds."""
    parts = [
        _title(report.file, f"opset {report.graph.opset}"),
        _facts("Graph", _graph(report.graph)),
        _facts("Precision", _precision(report.precision)),
    ]
    _print(console, parts)


def render_engine(report: EngineReport, console: Console) -> None:
    """Print what the header of an engine says."""
    parts = [_title(report.file, text.scaled(report.bytes, "B")), _facts("Header", _mapping(report.header))]
    _print(console, parts)


def _print(console: Console, parts: Iterable[RenderableType | None]) -> None:
    console.print(Group(*(part for part in parts if part is not None)), width=min(console.width, WIDTH))


def _plain(value: str, style: str = "") -> Text:
    return Text(text.printable(value), style=style)


def _title(left: str, right: str) -> RenderableType:
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(ratio=1)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(_plain(left, "bold"), _plain(right, "dim"))
    return Group(line, Rule(style="dim"))


def _header(report: Report) -> RenderableType:
    source = report.source
    about = " · ".join(part for part in (source.kind, source.task, source.exporter) if part)
    target = f" → {report.target.kind}" if report.target else ""
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(ratio=1)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(
        Text.assemble(_plain(source.title, "bold"), "  ", _plain(f"{report.recipe}{target}", "cyan")),
        Text.assemble(_RESULT[report.status], (f" in {text.seconds(report.timings.total)}", "dim")),
    )
    line.add_row(_plain(about, "dim"), Text(f"llmc {report.llmc}", "dim"))
    notes = [_plain(note, "dim") for note in source.notes]
    return Group(line, *notes, Rule(style="dim"))


def _passes(report: Report, width: int) -> RenderableType:
    columns = _columns(report)
    if width < ALL_COLUMNS_FROM:
        columns = {heading: cell for heading, cell in columns.items() if heading not in ("Near misses", "Weights")}
    table = Table(box=None, padding=(0, 1), header_style="dim", expand=True, pad_edge=False)
    table.add_column("")
    table.add_column("Pass", ratio=1, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for step in report.passes:
        mark, style = _STATUS[step.status]
        key = _plain(step.key, "dim" if step.status == "skipped" else "bold")
        table.add_row(Text(mark, style), key, *(cell(step) for cell in columns.values()))
    if not any(step.verified == "local" for step in report.passes):
        return table
    return Group(table, Text(text.LOCAL_NOTE, "dim"))


def _columns(report: Report) -> dict[str, Callable[[PassReport], str | Text]]:
    return {
        "Nodes": _node_change,
        "Rewrites": lambda step: str(len(step.rewrites) or ""),
        "Near misses": lambda step: str(len(step.near_misses) or ""),
        "Weights": lambda step: text.scaled(step.weight_bytes_after, "B"),
        "Cosine": lambda step: text.local(step, text.similarity(summary.worst_cosine(step))),
        "Max abs": lambda step: text.local(step, text.difference(summary.worst_max_abs(step))),
        "Time": lambda step: Text(summary.step_time(report, step), "dim"),
    }


def _node_change(step: PassReport) -> Text:
    before, after = summary.node_total(step.nodes_before), summary.node_total(step.nodes_after)
    if step.index == 0 or before == after:
        return Text(str(after))
    return Text.assemble((f"{before} → ", "dim"), str(after))


def _reasons(report: Report) -> RenderableType | None:
    """Why steps were skipped or broke a budget."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    for step in report.passes:
        if step.reason:
            mark, style = _STATUS[step.status]
            grid.add_row(Text(mark, style), _plain(f"{step.key}: {step.reason}", style))
    return Group(Text(), grid) if grid.row_count else None


def _facts(heading: str, rows: list[tuple[str, Text]]) -> RenderableType | None:
    """A heading, and below it labels with what there is to say; None where there is nothing."""
    if not rows:
        return None
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=LABELS)
    grid.add_column(ratio=1)
    for label, content in rows:
        grid.add_row(_plain(label), content)
    return Group(Text(), _plain(heading, "bold"), Padding(grid, (0, 0, 0, 2)))


def _frontier(step: PassReport) -> list[tuple[str, Text]]:
    rows = []
    for line in step.frontier:
        mark, layers, weights, time, cosine, bound, *_ = text.trade_off(line)
        content = f"{weights} of weights, time {time}, cosine {cosine} (≥ {bound}){f'  ← {mark}' if mark else ''}"
        rows.append((f"{layers} layers", _plain(content, "bold" if mark else "")))
    return rows


def _saturated(step: PassReport) -> list[tuple[str, Text]]:
    """The activations that lose most values to clipping."""
    lines = [line for line in summary.most_saturated(step) if line.saturated]
    rows = []
    for line in lines[:SATURATED_SHOWN]:
        tensor, share, clip, largest, _ = text.activation(line)
        rows.append((share, Text.assemble(_plain(tensor), (f"  beyond {clip}, up to {largest}", "dim"))))
    if len(lines) > SATURATED_SHOWN:
        rest = text.plural(len(lines) - SATURATED_SHOWN, "more tensor")
        rows.append(("", Text(f"and {rest} in the report", "dim")))
    return rows


def _near_misses(report: Report) -> list[tuple[str, Text]]:
    groups = summary.near_misses(report)
    rows = []
    for group in groups[:NEAR_MISSES_SHOWN]:
        more = f" and {len(group.places) - 1} more" if len(group.places) > 1 else ""
        place = _plain(f"at {group.first_place}{more}", "dim")
        rows.append((group.rule, Text.assemble(_plain(group.reason), "\n", place)))
    if len(groups) > NEAR_MISSES_SHOWN:
        rows.append(("", Text(f"and {len(groups) - NEAR_MISSES_SHOWN} more reasons in the report", "dim")))
    return rows


def _graph(graph: GraphReport) -> list[tuple[str, Text]]:
    operators = [f"{count} {name}" for name, count in graph.nodes.items()]
    rest = f", and {len(operators) - OPERATORS_SHOWN} more operators" if len(operators) > OPERATORS_SHOWN else ""
    nodes = f"{summary.node_total(graph.nodes)}: {', '.join(operators[:OPERATORS_SHOWN])}{rest}"
    weights = [
        f"{text.scaled(held.parameters, '')} × {dtype}, {text.scaled(held.bytes, 'B')}"
        for dtype, held in graph.weights.items()
    ]
    return [
        ("nodes", _plain(nodes)),
        ("weights", _lines(weights or ["none"])),
        ("FLOPs", _plain(text.flops(graph))),
        ("inputs", _lines([_tensor(tensor) for tensor in graph.inputs])),
        ("outputs", _lines([_tensor(tensor) for tensor in graph.outputs])),
    ]


def _tensor(tensor: TensorLine) -> str:
    return f"{tensor.name}  {tensor.dtype}  {text.shape(tensor.shape)}"


def _lines(lines: list[str]) -> Text:
    return Text("\n").join(_plain(line) for line in lines)


def _precision(layers: list[LayerPrecision]) -> list[tuple[str, Text]]:
    rows = []
    for group in summary.precision_groups(layers):
        operators = ", ".join(f"{count} {name}" for name, count in group.operators.items())
        label = group.found if group.as_asked else f"{group.engine or group.found}, asked {group.asked}"
        line = Text.assemble(f"{text.plural(group.count, 'layer')}  ", _plain(operators, "dim"))
        if group.engine == group.found:
            line.append(", in the engine too", "dim")
        if not group.as_asked:
            line.stylize("yellow", 0, len(text.plural(group.count, "layer")))
        rows.append((label, line))
    return rows


def _verification(report: Report) -> list[tuple[str, Text]]:
    verification = report.verification
    if verification is None:
        return []
    budgets = ", ".join(f"{metric} {limit:g}" for metric, limit in verification.budgets.items())
    return [
        ("against", _plain(verification.reference)),
        ("on", _plain(f"{text.plural(verification.samples, 'sample')}: {verification.inputs}")),
        ("budgets", _plain(budgets or "none")),
        *([("task", _plain(text.task(verification.task)))] if verification.task else []),
    ]


def _built(report: Report) -> list[tuple[str, Text]]:
    memory = text.memory(report.timings)
    rows = _target(report.target) if report.target else []
    return [*rows, *([("most memory", _plain(memory))] if memory else [])]


def _target(target: TargetReport) -> list[tuple[str, Text]]:
    memory = {key: value for key, value in target.facts.items() if key.endswith("_bytes")}
    rows = _mapping({key: value for key, value in target.facts.items() if key not in memory})
    if memory:
        rows.append(("bytes", _plain(text.fact("", memory))))
    for profile in target.profiles:
        sizes = ", ".join(f"{name} {least} / {best} / {most}" for name, (least, best, most) in profile.items())
        rows.append(("profile", _plain(f"{sizes}  (min / opt / max)")))
    if target.layers:
        rows.append(("layers", _plain(f"{len(target.layers)}, listed in the report")))
    return rows


def _mapping(facts: Mapping[str, object]) -> list[tuple[str, Text]]:
    return [(text.label(key), _plain(text.fact(key, value))) for key, value in facts.items()]


def _warnings(report: Report) -> RenderableType | None:
    found = summary.warnings(report)
    if not found:
        return None
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    for origin, message in found[:WARNINGS_SHOWN]:
        grid.add_row(Text("!", "bold yellow"), _plain(f"{origin}: {message}" if origin else message))
    if len(found) > WARNINGS_SHOWN:
        grid.add_row("", Text(f"and {len(found) - WARNINGS_SHOWN} more in the report", "dim"))
    heading = Text(text.plural(len(found), "warning").capitalize(), "bold yellow")
    return Group(Text(), heading, Padding(grid, (0, 0, 0, 2)))


def _files(report: Report, folder: Path | None) -> RenderableType | None:
    files = dict(report.target.files) if report.target else {}
    rows = [(name, Text(text.scaled(size, "B"))) for name, size in files.items()]
    if folder is not None:
        rows.append(("report", _plain(str(folder / "report.html"), "underline")))
    return _facts("Files" if folder is None else f"Files in {folder}", rows)
