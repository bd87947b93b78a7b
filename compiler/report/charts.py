"""Charts as inline SVG. All widths are percentages, so that a chart fits any page without scaling its text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from llmc.compiler.report.markup import Markup, element, join

ROW = 38
"""Pixels from one row to the next: a line of text and a bar below it."""
TEXT_BASELINE = 15
BAR_TOP = 21
BAR_HEIGHT = 8
MARK_RADIUS = 5
HISTOGRAM = 28
"""Pixels of a histogram's height."""
FLOOR = 1e-8
"""Errors at or below this stand at the left edge of the error chart: it is the rounding of float32 sums."""


@dataclass(frozen=True)
class Change:
    """A row of a bar chart: a count before (None: there was none to compare with) and after."""

    label: str
    before: int | None
    after: int
    muted: bool = False


@dataclass(frozen=True)
class Error:
    """A row of the error chart: measure → value; no values where nothing was compared."""

    label: str
    values: dict[str, float]
    changed: bool = True
    """Whether the step did anything that could have been compared."""


def change_bars(rows: Sequence[Change], title: str, most: int) -> Markup:
    """One bar a row: what stayed, then what was removed or added. `most` is the count of a whole row's width."""
    drawn = [_change_row(row, index * ROW, most) for index, row in enumerate(rows)]
    return _svg(title, len(rows) * ROW, *drawn)


def _change_row(row: Change, top: int, most: int) -> Markup:
    before = row.after if row.before is None else row.before
    text = str(row.after) if before == row.after else f"{before} → {row.after}"
    stayed = min(before, row.after)
    return element(
        "g",
        _label(row.label, top),
        element("text", text, x="100%", y=top + TEXT_BASELINE, text_anchor="end", class_="value"),
        _bar(0, stayed, most, top + BAR_TOP, "stayed"),
        _bar(stayed, before, most, top + BAR_TOP, "removed"),
        _bar(stayed, row.after, most, top + BAR_TOP, "added"),
        class_="muted" if row.muted else None,
    )


def _bar(start: int, end: int, most: int, top: int, class_: str) -> Markup | None:
    """A piece of a row's bar; nothing where it has no length."""
    if start == end:
        return None
    left, width = (f"{100 * count / most:.2f}%" for count in (start, end - start))
    return element("rect", x=left, y=top, width=width, height=BAR_HEIGHT, class_=class_)


def error_dots(rows: Sequence[Error], measures: Sequence[str], limits: dict[str, float], title: str) -> Markup:
    """One mark a measure in each row, on a logarithmic axis; a dashed line where a measure's limit is.

    Rows whose values are all 0 say 'equal': zero has no place on the axis, and gets no mark.
    `limits`: measure → largest value allowed. Values that are not finite stand at the right edge, coloured as failures.
    """
    finite = [v for v in (*(v for row in rows for v in row.values.values()), *limits.values()) if math.isfinite(v)]
    decades = _decades(finite)
    height = len(rows) * ROW
    grid = [
        join(
            element("line", x1=_place(10.0**d, decades), x2=_place(10.0**d, decades), y1=0, y2=height, class_="grid"),
            element(
                "text",
                f"1e{d}" if d else "1",
                x=_place(10.0**d, decades),
                y=height + TEXT_BASELINE,
                text_anchor=_anchor(d, decades),
                class_="tick",
            ),
        )
        for d in _ticks(decades)
    ]
    lines = [
        element(
            "line",
            element("title", f"budget of {measure}: {limit:g}"),
            x1=_place(limit, decades),
            x2=_place(limit, decades),
            y1=0,
            y2=height,
            class_=f"limit {series(measures.index(measure))}",
        )
        for measure, limit in limits.items()
    ]
    drawn = [_error_row(row, index * ROW, measures, decades) for index, row in enumerate(rows)]
    return _svg(title, height + ROW // 2 + 2, *grid, *lines, *drawn)


def _error_row(row: Error, top: int, measures: Sequence[str], decades: range) -> Markup:
    middle = top + BAR_TOP + BAR_HEIGHT // 2
    track = element("line", x1="0%", x2="100%", y1=middle, y2=middle, class_="track")
    marks = [
        _mark(row.values[measure], measure, index, middle, decades)
        for index, measure in enumerate(measures)
        if row.values.get(measure)
    ]
    compared = "" if marks else "equal"
    word = compared if row.values else "not compared" if row.changed else "unchanged"
    return element(
        "g",
        _label(row.label, top, element("tspan", word, dx=10, class_="value")),
        track,
        *marks,
        class_=None if row.values else "muted",
    )


def _mark(value: float, measure: str, index: int, middle: int, decades: range) -> Markup:
    title = element("title", f"{measure} {value:.3g}")
    class_ = f"mark {series(index)}" if math.isfinite(value) else "mark broken"
    return element("circle", title, cx=_place(value, decades), cy=middle, r=MARK_RADIUS, class_=class_)


def _decades(values: Sequence[float]) -> range:
    """Powers of ten from the axis' left edge to its right one."""
    most = max([1e-4, *values])
    least = max(FLOOR, min([1e-6, *(v for v in values if v > 0)]))
    return range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)


def _ticks(decades: range) -> range:
    return decades[:: math.ceil(len(decades) / 6)]


def _place(value: float, decades: range) -> str:
    if math.isnan(value) or value == math.inf:
        return "100%"
    if value <= 0:  # a budget of no difference at all: the left edge
        return "0%"
    share = (math.log10(value) - decades[0]) / (decades[-1] - decades[0])
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def _anchor(decade: int, decades: range) -> str:
    return "start" if decade == decades[0] else "end" if decade == decades[-1] else "middle"


def share_bar(shares: Sequence[int], title: str) -> Markup:
    """One bar cut into shares; the series colours follow the order given."""
    ends = [0, *accumulate(shares)]
    pieces = [
        _bar(start, end, ends[-1], 0, f"share {series(index)}") for index, (start, end) in enumerate(pairwise(ends))
    ]
    return _svg(title, BAR_HEIGHT, *pieces)


def histogram(counts: Sequence[int], title: str, clip: float | None = None) -> Markup:
    """One bar a count, as high as its logarithm; a line at `clip` (in bars), beyond which they have another colour."""
    most = math.log2(1 + max(counts))
    tops = [HISTOGRAM * (1 - math.log2(1 + count) / most) if count else HISTOGRAM for count in counts]
    inside = len(counts) if clip is None else min(len(counts), math.ceil(clip))
    bars = element(
        "svg",
        _outline(tops[:inside], 0, "stayed"),
        _outline(tops[inside:], inside, "added"),
        viewBox=f"0 0 {len(counts)} {HISTOGRAM}",
        preserveAspectRatio="none",
        width="100%",
        height=HISTOGRAM,
    )
    drawn = clip is not None and clip < len(counts)
    place = f"{100 * (clip or 0) / len(counts):.2f}%"
    line = element("line", x1=place, x2=place, y1=0, y2=HISTOGRAM, class_="clip") if drawn else None
    return _svg(title, HISTOGRAM, bars, line)


def _outline(tops: Sequence[float], start: int, class_: str) -> Markup | None:
    """Bars of width 1 side by side, as one path."""
    if not tops:
        return None
    steps = "".join(f"V{top:.3g}h1" for top in tops)
    return element("path", d=f"M{start} {HISTOGRAM}{steps}V{HISTOGRAM}z", class_=class_)


def series(index: int) -> str:
    """The style class, and so the colour, of a chart's series; the last colour is that of all further ones."""
    return f"series{min(index, 4)}"


def _label(label: str, top: int, *remarks: Markup) -> Markup:
    return element("text", label, *remarks, x=0, y=top + TEXT_BASELINE, class_="label")


def _svg(title: str, height: int, *children: Markup | None) -> Markup:
    return element("svg", element("title", title), *children, width="100%", height=height, role="img", aria_label=title)
