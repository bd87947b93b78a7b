"""The error along the graph, drawn: SVG for files, one line of characters for terminals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from llmc.compiler.blame.growth import landmarks
from llmc.compiler.blame.report import Blame, TensorError
from llmc.compiler.report.markup import Markup, element, join

WIDTH, HEIGHT = 960, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 28, 26
DECADES = range(-8, 3)
"""Powers of ten of the relative error that are drawn; 1e-8 is the rounding of float32."""
BLOCKS = "▁▂▃▄▅▆▇█"
LEAST_SPAN = 1.0
"""Powers of ten from the lowest block to the highest, at least."""
EQUAL, NOT_FINITE = "·", "×"
STYLE = """
svg { background: #fff; font: 12px system-ui, sans-serif; fill: #44403c; }
.grid { stroke: #e7e5e4; } .line { fill: none; stroke-width: 1.5; }
.step { stroke: #2f62d9; } .total { stroke: #d2690e; }
.mark { fill: #2f62d9; } .broken { fill: #c81e1e; } .key.step { fill: #2f62d9; stroke: none; }
.key.total { fill: #d2690e; stroke: none; } .guilty { stroke: #c81e1e; stroke-dasharray: 4 3; }
"""


def sparkline(errors: Sequence[TensorError], width: int) -> str:
    """The largest error of each of at most `width` stretches along the graph, on a logarithmic scale of their range."""
    columns = min(width, len(errors))
    ends = [round(column * len(errors) / max(columns, 1)) for column in range(columns + 1)]
    most = [_most(errors[start:end]) for start, end in pairwise(ends)]
    levels = [math.log10(value) for value in most if 0 < value < math.inf]
    top = max(levels, default=0.0)
    span = max(top - min(levels, default=0.0), LEAST_SPAN)
    return "".join(_block(value, top, span) for value in most)


def _most(errors: Sequence[TensorError]) -> float:
    return max((error.relative_l2 or 0.0) if error.finite else math.inf for error in errors)


def _block(error: float, top: float, span: float) -> str:
    if error == math.inf:
        return NOT_FINITE
    if error == 0:
        return EQUAL
    return BLOCKS[round((1 - (top - math.log10(error)) / span) * (len(BLOCKS) - 1))]


def _height(error: float) -> float:
    """0 at the floor of the scale or below, 1 at its end or above."""
    if error <= 0:
        return 0.0
    share = (math.log10(error) - DECADES[0]) / (DECADES[-1] - DECADES[0]) if math.isfinite(error) else 1.0
    return min(1.0, max(0.0, share))


def svg(blame: Blame) -> str:
    """Relative error of each tensor, in graph order: of the guilty rewrite alone, and of the whole compile."""
    places = {error.tensor: _x(index, len(blame.growth)) for index, error in enumerate(blame.growth)}
    guilty = blame.guilty
    assert guilty is not None
    title = f"Error along the graph: rewrite {guilty.number}, {guilty.rule} at '{guilty.node}'"
    chart = element(
        "svg",
        element("title", title),
        Markup(f"<style>{STYLE}</style>"),
        *(_grid(decade) for decade in DECADES[::2]),
        element("text", "relative L2 error", x=4, y=TOP - 12),
        element("text", "the guilty rewrite alone", x=WIDTH - RIGHT, y=TOP - 12, text_anchor="end", class_="key step"),
        element("text", "the whole compile", x=WIDTH - RIGHT - 170, y=TOP - 12, text_anchor="end", class_="key total"),
        element("text", "along the graph →", x=LEFT, y=HEIGHT - 8),
        _line([error for error in blame.total if error.tensor in places], places, "total"),
        _line(blame.growth, places, "step"),
        _appears(blame, places),
        *(_mark(error, places[error.tensor]) for error in landmarks(blame.growth, 40)),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=title,
    )
    return f"{chart}\n"


def _x(index: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * index / max(count - 1, 1)


def _y(error: TensorError) -> float:
    share = _height(error.relative_l2 or 0.0) if error.finite else 1.0
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _grid(decade: int) -> Markup:
    y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (decade - DECADES[0]) / (DECADES[-1] - DECADES[0])
    return join(
        element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"),
        element("text", f"1e{decade}" if decade else "1", x=LEFT - 6, y=y + 4, text_anchor="end"),
    )


def _line(errors: Sequence[TensorError], places: dict[str, float], kind: str) -> Markup:
    points = sorted((places[error.tensor], _y(error)) for error in errors)
    return element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=f"line {kind}")


def _appears(blame: Blame, places: dict[str, float]) -> Markup | None:
    if blame.appears is None:
        return None
    x = places[blame.appears.tensor]
    return join(
        element("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="guilty"),
        element("text", blame.appears.module or blame.appears.node, x=min(x + 4, WIDTH - 260), y=HEIGHT - BOTTOM - 6),
    )


def _mark(error: TensorError, x: float) -> Markup:
    told = f"{error.relative_l2:.2e}" if error.finite else "NaN or infinite"
    title = element("title", f"{error.tensor} ({error.op} '{error.node}', {error.module}): {told}")
    return element("circle", title, cx=x, cy=_y(error), r=3, class_="mark" if error.finite else "mark broken")
