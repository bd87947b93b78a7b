"""The report as one HTML page that needs nothing else: no script, no network, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files

from llmc.compiler.report import (
    LayerPrecision,
    OutputNumerics,
    PassReport,
    Report,
    TargetReport,
    TensorLine,
    charts,
    summary,
    text,
)
from llmc.compiler.report.activations import quantized
from llmc.compiler.report.markup import Child, Markup, code, element, fold, legend, pairs, place, section, table

OPERATORS_SHOWN = 12
MEASURES = {"max_abs": "max abs", "relative_l2": "relative L2", "cosine": "1 − cosine"}
"""Metrics of budgets that have a place on an axis of errors → what is drawn there."""
CHANGE_KEYS = (("stayed", "stayed"), ("removed", "removed"), ("added", "added"))
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STATUS = {
    "done": "done",
    "skipped": "skipped",
    "rolled back": "broken",
    "over budget": "broken",
    "crashed": "broken",
}


def render(report: Report) -> str:
    """The page; the same report gives the same bytes."""
    title = f"{report.source.name} · {report.recipe}"
    style = Markup(files(__package__).joinpath("report.css").read_text(encoding="utf-8"))
    head = element(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        element("title", f"llmc: {title}"),
        element("style", style),
    )
    pages = [part for graph in report.graphs() for part in (_header(graph), element("main", *_sections(graph)))]
    body = element("body", *pages, _footer(report))
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def _sections(report: Report) -> Iterable[Markup | None]:
    yield _warnings(report)
    yield _tiles(report)
    yield element("div", _node_chart(report), _error_chart(report), class_="columns")
    yield _passes(report)
    yield from map(_frontier, report.passes)
    yield from map(quantized, report.passes)
    yield _near_misses(report)
    yield _operator_chart(report)
    yield _precision(report)
    yield _graph(report)
    yield _target(report.target) if report.target else None
    yield _provenance(report)


def _header(report: Report) -> Markup:
    source = report.source
    arrow = f"{report.recipe} → {report.target.kind}" if report.target else report.recipe
    about = " · ".join(part for part in (source.kind, source.task, source.exporter) if part)
    return element(
        "header",
        element(
            "p",
            "llmc report",
            element("span", report.status, class_=f"pill {_STATUS.get(report.status, 'broken')}"),
            class_="kicker",
        ),
        element("h1", source.title),
        element("p", element("strong", arrow), element("span", about), class_="subtitle"),
    )


def _warnings(report: Report) -> Markup | None:
    broken = [(step.key, step.reason) for step in summary.failed(report)]
    found = summary.warnings(report)
    if not found and not broken:
        return None
    items = [
        element("li", element("strong", f"{origin}: ") if origin else None, message, class_=class_)
        for class_, lines in (("broken", broken), (None, found))
        for origin, message in lines
    ]
    return element("section", element("ul", *items), class_="warnings broken" if broken else "warnings")


def _tiles(report: Report) -> Markup:
    nodes = summary.node_total(report.graph.nodes)
    nodes_before = summary.node_total(summary.first_nodes(report))
    parameters, weight_bytes = summary.weight_totals(report)
    weights_before = summary.first_weight_bytes(report)
    last = summary.last_numerics(report)
    tiles = [
        ("Nodes", f"{nodes:,}", _percent(nodes_before, nodes)),
        ("Weights", text.scaled(weight_bytes, "B"), _percent(weights_before, weight_bytes)),
        ("Parameters", text.scaled(parameters, ""), ""),
    ]
    if report.graph.flops is not None:
        at = ", ".join(f"{name} {size}" for name, size in report.graph.sizes.items())
        tiles.append(("FLOPs", text.scaled(report.graph.flops, ""), f"at {at}" if at else ""))
    if last is not None:
        cosine, furthest = summary.worst_cosine(last), summary.worst_max_abs(last)
        tiles.append(("Cosine", text.similarity(cosine), f"max abs {text.difference(furthest)}"))
    if report.target and report.target.files:
        name, size = next(iter(report.target.files.items()))
        tiles.append((name, text.scaled(size, "B"), ""))
    tiles.append(("Time", text.seconds(report.timings.total), text.memory(report.timings)))
    drawn = [
        element(
            "div",
            element("span", label, class_="tile-label"),
            element("span", value, class_="tile-value"),
            element("span", note, class_="tile-note"),
            class_="tile",
        )
        for label, value, note in tiles
    ]
    return element("section", *drawn, class_="tiles")


def _percent(before: int | None, after: int) -> str:
    if not before:
        return ""
    change = round(100 * (after - before) / before)
    return f"{'+' if change > 0 else '−'}{abs(change)} % since load" if change else ""


def _node_chart(report: Report) -> Markup:
    rows = [
        charts.Change(
            step.key,
            summary.node_total(step.nodes_before) if step.index else None,
            summary.node_total(step.nodes_after),
            muted=step.status == "skipped",
        )
        for step in report.passes
    ]
    title = "Nodes through the passes"
    return section(title, charts.change_bars(rows, title, _most(rows)), legend(*CHANGE_KEYS))


def _most(rows: Iterable[charts.Change]) -> int:
    return max([1, *(max(row.before or 0, row.after) for row in rows)])


def _error_chart(report: Report) -> Markup | None:
    rows = [charts.Error(step.key, _errors(step), bool(step.rewrites)) for step in report.passes]
    if not any(row.values for row in rows) or report.verification is None:
        return None
    limits = {
        MEASURES[metric]: 1 - limit if metric == "cosine" else limit
        for metric, limit in report.verification.budgets.items()
        if metric in MEASURES
    }
    measures = tuple(MEASURES.values())
    title = f"Error after each pass, against {report.verification.reference}"
    keys = [(charts.series(index), measure) for index, measure in enumerate(measures)]
    return section(
        title,
        charts.error_dots(rows, measures, limits, title),
        legend(*keys, *([("limit", "budget")] if limits else [])),
    )


def _errors(step: PassReport) -> dict[str, float]:
    if not step.numerics:
        return {}
    furthest, relative, cosine = (
        worst(step) for worst in (summary.worst_max_abs, summary.worst_relative_l2, summary.worst_cosine)
    )
    if furthest is None or relative is None or cosine is None:
        return {}
    gap = 1 - cosine if furthest else 0.0  # the cosine of equal vectors is 1 but for its own rounding
    return dict(zip(MEASURES.values(), (furthest, relative, gap), strict=True))


def _operator_chart(report: Report) -> Markup:
    changes = summary.operator_changes(summary.first_nodes(report), report.graph.nodes)
    rows = [charts.Change(*change) for change in changes[:OPERATORS_SHOWN]]
    rest = changes[OPERATORS_SHOWN:]
    if rest:
        before, after = sum(old for _, old, _ in rest), sum(new for _, _, new in rest)
        rows.append(charts.Change(text.plural(len(rest), "other operator"), before, after, muted=True))
    title = "Operators before and after"
    middle = (len(rows) + 1) // 2
    halves = [charts.change_bars(half, title, _most(rows)) for half in (rows[:middle], rows[middle:])]
    return section(title, element("div", *halves, class_="columns"), legend(*CHANGE_KEYS))


def _passes(report: Report) -> Markup:
    return section("Passes", *(_pass(report, step) for step in report.passes))


def _pass(report: Report, step: PassReport) -> Markup:
    before, after = summary.node_total(step.nodes_before), summary.node_total(step.nodes_after)
    furthest = summary.worst_max_abs(step)
    cells = [
        ("key", step.key),
        ("nodes", f"{text.arrow(before, after) if step.index else after} nodes"),
        ("rewrites", text.plural(len(step.rewrites), "rewrite") if step.rewrites else ""),
        ("misses", text.plural(len(step.near_misses), "near miss") if step.near_misses else ""),
        ("error", f"max abs {text.local(step, text.difference(furthest))}" if furthest is not None else ""),
        ("last", summary.step_time(report, step)),
    ]
    line = element("summary", *(element("span", value, class_=class_) for class_, value in cells))
    return element(
        "details",
        line,
        element("div", *_pass_details(step), class_="inside"),
        class_=f"row pass {_STATUS[step.status]}",
    )


def _pass_details(step: PassReport) -> Iterable[Markup]:
    if step.reason:
        yield element("p", step.reason, class_="reason")
    if step.parameters:
        yield pairs((text.label(key), text.fact(key, value)) for key, value in step.parameters.items())
    changes = [row for row in summary.operator_changes(step.nodes_before, step.nodes_after) if row[1] != row[2]]
    if step.index and changes:
        yield element("h3", "Operators")
        yield table(("Operator", "#Before", "#After"), [(code(name), old, new) for name, old, new in changes])
    if step.numerics:
        yield element("h3", "Numerics")
        yield table(("Output", *_NUMERICS), [(code(n.output), *_numerics(n)) for n in step.numerics])
    if step.left_out:
        rewrites = [(r.number, code(r.rule), place(r.node, r.module), r.detail) for r in step.left_out]
        yield fold("Left out", len(rewrites), table(("#No.", "Rule", "Node", ""), rewrites))
    if step.regions_compared:
        yield fold("Regions that moved", len(step.regions), _regions(step))
    if step.kept:
        content = table(("Node", "Kept because"), [(code(node), why) for node, why in step.kept.items()])
        yield fold("Precision left alone", len(step.kept), content)
    if step.rewrites:
        rewrites = [(r.number, code(r.rule), place(r.node, r.module), r.detail) for r in step.rewrites]
        yield fold("Rewrites", len(step.rewrites), table(("#No.", "Rule", "Node", ""), rewrites))


_NUMERICS = ("#Max abs", "#Relative L2", "#Cosine", "#SQNR", "Finite", "Other")


def _numerics(numerics: OutputNumerics) -> tuple[str, ...]:
    return (
        text.difference(numerics.max_abs),
        text.difference(numerics.relative_l2),
        text.similarity(numerics.cosine),
        text.decibels(numerics),
        "yes" if numerics.finite else "no",
        ", ".join(f"{name} {value:.4g}" for name, value in summary.other_metrics(numerics).items()),
    )


def _regions(step: PassReport) -> Markup:
    note = f"{text.plural(step.regions_compared, 'region')} compared with what stood there before; the furthest first."
    rows = [
        (place(", ".join(region.nodes or region.replaced), region.module), code(output.output), *_numerics(output))
        for region in step.regions
        for output in region.outputs
    ]
    return element("div", element("p", note, class_="note"), table(("Nodes", "Tensor", *_NUMERICS), rows))


def _frontier(step: PassReport) -> Markup | None:
    """What a search over precisions has measured: error against bytes and time, the cheapest first."""
    if not step.frontier:
        return None
    measures = tuple(MEASURES.values())
    rows = []
    for line in step.frontier:
        mark, layers, weights, time, *_ = text.trade_off(line)
        label = " · ".join(part for part in (f"{layers} layers", weights, f"time {time}", mark) if part)
        cosine = line.cosine_bound
        errors = {"cosine": None if cosine is None else 1 - cosine, "relative_l2": line.relative_l2_bound}
        values = {MEASURES[metric]: value for metric, value in errors.items() if value is not None}
        rows.append(charts.Error(label, values))
    title = f"Assignments that {step.key} measured"
    keys = [(charts.series(index), measure) for index, measure in enumerate(measures)]
    note = "Drawn is what the mean over all data like the samples keeps to, with 95 % confidence."
    return section(
        title,
        element("p", note, class_="note"),
        charts.error_dots(rows, measures, {}, title),
        legend(*keys),
        table(text.TRADE_OFFS, map(text.trade_off, step.frontier)),
    )


def _near_misses(report: Report) -> Markup | None:
    groups = summary.near_misses(report)
    if not groups:
        return None
    note = element("p", "Where a rewrite almost applied, and the first thing that stopped it.", class_="note")
    return section("Near misses", note, *(_near_miss(group) for group in groups))


def _near_miss(group: summary.NearMisses) -> Markup:
    line = element(
        "summary",
        element("span", group.rule, class_="key"),
        element("span", group.reason, class_="reason"),
        element("span", text.plural(len(group.places), "place"), class_="last"),
    )
    places = [element("li", place(miss.node, miss.module)) for miss in group.places]
    return element("details", line, element("div", element("ul", *places), class_="inside"), class_="row miss")


def _precision(report: Report) -> Markup | None:
    if not report.precision:
        return None
    found: dict[str, int] = {}
    for layer in report.precision:
        found[layer.found] = found.get(layer.found, 0) + 1
    shares = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    rows = [
        (
            group.asked,
            element("span", group.found, class_=None if group.as_asked else "differs"),
            element("span", group.engine, class_=None if group.as_asked else "differs"),
            group.count,
            ", ".join(f"{count} {name}" for name, count in group.operators.items()),
        )
        for group in summary.precision_groups(report.precision)
    ]
    return section(
        "Precision of layers",
        charts.share_bar([count for _, count in shares], "Layers by the precision found"),
        legend(*((charts.series(index), f"{dtype} {count}") for index, (dtype, count) in enumerate(shares))),
        table(("Asked", "Found", "Engine", "#Layers", "Operators"), rows),
        _layers(report.precision),
    )


def _layers(layers: Sequence[LayerPrecision]) -> Markup:
    rows = [
        (
            place(layer.node, layer.module),
            code(layer.op),
            layer.asked,
            element("span", layer.found, class_=None if layer.asked == layer.found else "differs"),
            layer.engine,
            element("span", layer.reason, class_="prose"),
        )
        for layer in layers
    ]
    return fold("Layer by layer", len(rows), table(("Layer", "Operator", "Asked", "Found", "Engine", "Why"), rows))


def _graph(report: Report) -> Markup:
    graph = report.graph
    tensors = [*(_tensor("input", tensor) for tensor in graph.inputs), *(_tensor("output", t) for t in graph.outputs)]
    weights = [(dtype, f"{held.parameters:,}", text.scaled(held.bytes, "B")) for dtype, held in graph.weights.items()]
    return section(
        "Graph",
        pairs([("opset", graph.opset), ("FLOPs", text.flops(graph))]),
        element(
            "div",
            table(("", "Name", "dtype", "Shape"), tensors),
            table(("Weights", "#Values", "#Bytes"), weights),
            class_="columns",
        ),
    )


def _tensor(role: str, tensor: TensorLine) -> tuple[Child, ...]:
    return role, code(tensor.name), tensor.dtype, text.shape(tensor.shape)


def _target(target: TargetReport) -> Markup:
    facts = pairs((text.label(key), text.fact(key, value)) for key, value in target.facts.items())
    files = [(code(name), text.scaled(size, "B")) for name, size in target.files.items()]
    sizes = [
        (index, code(name), *bounds)
        for index, profile in enumerate(target.profiles, 1)
        for name, bounds in profile.items()
    ]
    tables = [
        table(("File", "#Size"), files) if files else None,
        table(("Profile", "Dimension", "#Min", "#Opt", "#Max"), sizes) if sizes else None,
    ]
    parts = [element("div", facts, element("div", *tables), class_="columns")]
    if target.layers:
        keys = list(dict.fromkeys(key for layer in target.layers for key in layer))
        cells = [[text.fact(key, layer.get(key, "")) for key in keys] for layer in target.layers]
        parts.append(fold("Layers of the engine", len(cells), table([text.label(key) for key in keys], cells)))
    return section(f"Target: {target.kind}", *parts)


def _provenance(report: Report) -> Markup:
    source = report.source
    about: list[tuple[str, Child]] = [("source", source.name), ("SHA-256", code(source.sha256))]
    about += [("note", note) for note in source.notes]
    if report.verification:
        verification = report.verification
        budgets = ", ".join(f"{metric} {limit:g}" for metric, limit in verification.budgets.items())
        about.append(("verified on", f"{text.plural(verification.samples, 'sample')}: {verification.inputs}"))
        about.append(("budgets", budgets or "none"))
        if verification.task:
            about.append(("task", text.task(verification.task)))
    times = [(step, text.time_of(report.timings, step)) for step in report.timings.steps]
    return section(
        "Where it came from",
        pairs(about),
        element(
            "div",
            table(("Package", "Version"), [("llmc", report.llmc), *report.versions.items()]),
            table(("Step", "#Time"), times),
            class_="columns",
        ),
    )


def _footer(report: Report) -> Markup:
    return element("footer", f"Written by llmc {report.llmc}. The same facts for programs: report.json.")
