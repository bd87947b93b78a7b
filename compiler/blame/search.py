"""Bisection over the numbered rewrites of a compile."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llmc.compiler.blame.replay import Replay
from llmc.compiler.blame.report import Point
from llmc.compiler.recipe.sections import AT_LEAST
from llmc.compiler.report import OutputNumerics
from llmc.compiler.verification import Verifier, breaches
from llmc.passes.graph import Graph

Limits = Callable[[str | None], Mapping[str, float]]
"""Key of a pass, or None for the loaded graph → metric → limit."""
WOBBLE = 0.1
"""An error that falls by more than this share of the largest one is not taken for rounding."""


def badness(numerics: Sequence[OutputNumerics], metric: str) -> float:
    """How bad the worst output is, larger is worse: 1 - cosine, minus decibels, else the metric itself."""
    return max((_badness(line, metric) for line in numerics), default=0.0)


def _badness(line: OutputNumerics, metric: str) -> float:
    value = getattr(line, metric)
    if not line.finite:
        return math.inf
    if value is None:  # sqnr_db of equal outputs
        return -math.inf
    if metric == "cosine":
        return 1.0 - float(value)
    return -float(value) if metric in AT_LEAST else float(value)


@dataclass
class Search:
    """Measures graphs after any number of rewrites, each once."""

    replay: Replay
    verifier: Verifier
    limits: Limits
    begin: Callable[[str], None] = lambda _phase: None
    points: dict[int, Point] = field(default_factory=dict)

    def at(self, number: int) -> Point:
        """The graph after `number` rewrites."""
        if number not in self.points:
            self.begin(f"measuring after rewrite {number} of {self.replay.count}")
            self.points[number] = self.measure(self.replay.graph_after(number), number)
        return self.points[number]

    def measure(self, graph: Graph, number: int) -> Point:
        """Any graph, under the budget of the pass that did rewrite `number`."""
        key = self.replay.owner(number).step.key() if number else None
        numerics = self.verifier.measure(graph)
        return Point(rewrites=number, numerics=numerics, breaches=breaches(numerics, self.limits(key)))

    def first_bad(self) -> int | None:
        """A rewrite after which the budget is broken, and before which it held; 0: it never held. None: all is well.

        Bisects the ends of passes first, then the rewrites of one. The first one of all where errors only grow.
        """
        if not self.at(0).holds:
            return 0
        if self.at(self.replay.count).holds:
            return None
        ends = self.replay.boundaries()
        end = ends[bisect_left(ends, True, lo=1, hi=len(ends) - 1, key=lambda number: not self.at(number).holds)]
        start = ends[ends.index(end) - 1]
        return self._between(start, end)

    def scan(self) -> int | None:
        """The first rewrite of all after which the budget is broken, by measuring after every one; 0, None as above."""
        return next((number for number in range(self.replay.count + 1) if not self.at(number).holds), None)

    def _between(self, good: int, bad: int) -> int:
        while bad - good > 1:
            middle = (good + bad) // 2
            if self.at(middle).holds:
                good = middle
            else:
                bad = middle
        return bad

    def monotone(self, metric: str) -> bool:
        """Whether, of the points measured, later ones are never clearly better than earlier ones."""
        errors = [badness(point.numerics, metric) for _, point in sorted(self.points.items())]
        most = max((abs(error) for error in errors if math.isfinite(error)), default=0.0)
        worst = -math.inf
        for error in errors:
            if worst > error and (math.isinf(worst) or worst - error > WOBBLE * most):
                return False
            worst = max(worst, error)
        holds = [point.holds for _, point in sorted(self.points.items())]
        return holds == sorted(holds, reverse=True)
