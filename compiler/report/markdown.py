"""The report as GitHub-flavoured Markdown, for pull requests and job summaries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from llmc.compiler.report import GraphReport, LayerPrecision, PassReport, Report, TargetReport, summary, text

_SPECIAL = re.compile(r"[\\`*\[\]<>|~&#@$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_TAME = re.compile(r"[^`|\\\s]+( [^`|\\\s]+)*")
"""What can stand between backticks in a table's cell as it is."""
QUANTIZED_SHOWN = 8
_STATUS = {"done": "✓", "skipped": "–", "rolled back": "↩", "over budget": "✗", "crashed": "✗"}


def render(report: Report) -> str:
    """The document; the same report gives the same bytes."""
    return "\n\n".join(block for graph in report.graphs() for block in _blocks(graph) if block) + "\n"


def escape(name: str) -> str:
    """The text as it is to be read: no character of it acts as Markdown or HTML."""
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", text.printable(name))


def code(name: str) -> str:
    """A name in code style, where no character of it could end that."""
    shown = text.printable(name)
    return f"`{shown}`" if _TAME.fullmatch(shown) else escape(name)


def _blocks(report: Report) -> Iterator[str]:
    yield f"# {escape(report.source.title)}"
    yield _head(report)
    yield _warnings(report)
    yield _passes(report)
    yield from map(_frontier, report.passes)
    yield from map(_quantized, report.passes)
    yield _near_misses(report)
    yield _precision(report.precision)
    yield _graph(report.graph)
    yield _target(report.target) if report.target else ""
    yield _layers(report.precision)
    yield _provenance(report)


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Cells are Markdown already; a heading that starts with '#' is of numbers."""
    rule = ["---:" if heading.startswith("#") else "---" for heading in headings]
    lines = [[heading.removeprefix("#") for heading in headings], rule, *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _fold(heading: str, content: str) -> str:
    return f"<details><summary>{heading}</summary>\n\n{content}\n\n</details>"


def _head(report: Report) -> str:
    target = f" → {report.target.kind}" if report.target else ""
    about = ", ".join(part for part in (report.source.kind, report.source.task, report.source.exporter) if part)
    time = text.seconds(report.timings.total)
    memory = text.memory(report.timings)
    most = f", with at most {memory} in memory" if memory else ""
    return f"**{escape(report.recipe + target)}**: {report.status} in {time}{most} ({escape(about)})"


def _warnings(report: Report) -> str:
    broken = [(step.key, step.reason) for step in summary.failed(report)]
    lines = [
        f"> - {escape(f'{origin}: {message}' if origin else message)}"
        for origin, message in (*broken, *summary.warnings(report))
    ]
    return "\n".join([f"> [!{'CAUTION' if broken else 'WARNING'}]", *lines]) if lines else ""


def _passes(report: Report) -> str:
    rows = [_pass_row(report, step) for step in report.passes]
    headings = ("", "Pass", "#Nodes", "#Rewrites", "#Near misses", "#Weights", "#Cosine", "#Max abs", "#Time")
    reasons = [f"- {escape(f'{step.key}: {step.reason}')}" for step in report.passes if step.status == "skipped"]
    notes = [text.LOCAL_NOTE] if any(step.verified == "local" for step in report.passes) else []
    return "\n\n".join(["## Passes", _table(headings, rows), *notes, *(["\n".join(reasons)] if reasons else [])])


def _pass_row(report: Report, step: PassReport) -> tuple[object, ...]:
    before, after = summary.node_total(step.nodes_before), summary.node_total(step.nodes_after)
    return (
        _STATUS[step.status],
        escape(step.key),
        text.arrow(before, after) if step.index else after,
        len(step.rewrites) or "",
        len(step.near_misses) or "",
        text.scaled(step.weight_bytes_after, "B"),
        text.local(step, text.similarity(summary.worst_cosine(step))),
        text.local(step, text.difference(summary.worst_max_abs(step))),
        summary.step_time(report, step),
    )


def _frontier(step: PassReport) -> str:
    if not step.frontier:
        return ""
    return f"## Assignments that {step.key} measured\n\n{_table(text.TRADE_OFFS, map(text.trade_off, step.frontier))}"


def _quantized(step: PassReport) -> str:
    """The activations and weights that lose most to clipping, and how far apart scales are."""
    parts = [*_activations(step), *_weights(step)]
    if not parts:
        return ""
    scales = {kind: octaves for kind, octaves in summary.scales(step).items() if octaves}
    octaves = range(*_reach(octave for found in scales.values() for octave in found))
    counts = [(f"2^{e}", *(found.get(e, 0) for found in scales.values())) for e in octaves]
    fold = _fold("Scales", _table(("From", *(f"#Scales of {kind}" for kind in scales)), counts))
    return "\n\n".join([f"## What {step.key} quantized", *parts, fold])


def _activations(step: PassReport) -> Iterator[str]:
    lines = summary.most_saturated(step)
    rows = [
        (code(line.tensor), *map(escape, text.activation(line)[1:]), text.bars(line.counts))
        for line in lines[:QUANTIZED_SHOWN]
    ]
    if rows:
        yield "Values on the calibration data; what is larger than the clipping point saturates."
        yield _table((*text.ACTIVATIONS, "Magnitudes, 0 to largest"), rows)
        yield from _more("activation", len(lines) - len(rows))


def _weights(step: PassReport) -> Iterator[str]:
    lines = summary.most_clipped(step)
    shown = lines[:QUANTIZED_SHOWN]
    if shown:
        yield "Weights, and the share of their values that are beyond the last level by half a step or more."
        yield _table(("Weight", "#Saturated"), [(code(name), escape(text.share(share))) for name, share in shown])
        yield from _more("weight", len(lines) - len(shown))


def _more(kind: str, count: int) -> Iterator[str]:
    if count:
        yield f"{text.plural(count, f'more {kind}')} in report.json, none of which saturates more."


def _reach(exponents: Iterable[int]) -> tuple[int, int]:
    found = sorted(exponents)
    return found[0], found[-1] + 1


def _near_misses(report: Report) -> str:
    rows = [
        (
            code(group.rule),
            escape(group.reason),
            code(group.first_place),
            len(group.places),
        )
        for group in summary.near_misses(report)
    ]
    return f"## Near misses\n\n{_table(('Rule', 'What stopped it', 'First place', '#Places'), rows)}" if rows else ""


def _precision(layers: Sequence[LayerPrecision]) -> str:
    rows = [
        (
            escape(group.asked),
            escape(group.found) if group.as_asked else f"**{escape(group.found)}**",
            escape(group.engine),
            group.count,
            escape(", ".join(f"{count} {name}" for name, count in group.operators.items())),
        )
        for group in summary.precision_groups(layers)
    ]
    return f"## Precision\n\n{_table(('Asked', 'Found', 'Engine', '#Layers', 'Operators'), rows)}" if rows else ""


def _graph(graph: GraphReport) -> str:
    tensors = [("input", tensor) for tensor in graph.inputs] + [("output", tensor) for tensor in graph.outputs]
    boundary = [(role, code(t.name), t.dtype, escape(text.shape(t.shape))) for role, t in tensors]
    weights = [(dtype, f"{held.parameters:,}", text.scaled(held.bytes, "B")) for dtype, held in graph.weights.items()]
    operators = [(code(name), count) for name, count in graph.nodes.items()]
    nodes = summary.node_total(graph.nodes)
    return "\n\n".join(
        [
            "## Graph",
            f"{text.plural(nodes, 'node')}, opset {graph.opset}, FLOPs: {escape(text.flops(graph))}",
            _table(("", "Name", "dtype", "Shape"), boundary),
            _table(("Weights", "#Values", "#Bytes"), weights),
            _fold("Operators", _table(("Operator", "#Nodes"), operators)),
        ]
    )


def _target(target: TargetReport) -> str:
    facts = [(escape(text.label(key)), escape(text.fact(key, value))) for key, value in target.facts.items()]
    facts += [(code(name), text.scaled(size, "B")) for name, size in target.files.items()]
    facts += [
        (f"{code(name)}, min / opt / max", " / ".join(str(size) for size in bounds))
        for profile in target.profiles
        for name, bounds in profile.items()
    ]
    return f"## Target: {escape(target.kind)}\n\n{_table(('Fact', 'Value'), facts)}"


def _layers(layers: Sequence[LayerPrecision]) -> str:
    if not layers:
        return ""
    rows = [
        (code(layer.node), code(layer.op), *map(escape, (layer.asked, layer.found, layer.engine, layer.reason)))
        for layer in layers
    ]
    return _fold("Precision, layer by layer", _table(("Layer", "Operator", "Asked", "Found", "Engine", "Why"), rows))


def _provenance(report: Report) -> str:
    rows = [("source SHA-256", code(report.source.sha256)), ("llmc", escape(report.llmc))]
    rows += [(escape(package), escape(version)) for package, version in report.versions.items()]
    if report.verification:
        verification = report.verification
        samples = f"{text.plural(verification.samples, 'sample')}: {verification.inputs}"
        rows.append(("verified against", escape(f"{verification.reference}, on {samples}")))
        if verification.task:
            rows.append(("task", escape(text.task(verification.task))))
    return _fold("Where it came from", _table(("What", "Value"), rows))
