"""A pass that broke a budget, run again without the rewrites that broke it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from llmc.compiler.pipeline import Step
from llmc.compiler.verification.judge import Verdict
from llmc.passes.base import Applied, PassResult

MOST_GUILTY = 8
"""Rewrites that are left out one by one; a pass with more guilty ones is left out as a whole."""

Rerun = Callable[[int | None, Collection[tuple[str, str]]], Step]
"""Runs the pass again on the graph before it, up to a rewrite's number, without the refused (rule, node) pairs."""


@dataclass
class Attempt:
    """The pass without what was guilty."""

    step: Step
    verdict: Verdict
    left_out: list[Applied] = field(default_factory=list)
    """The guilty rewrites; all of them where the pass was left out as a whole."""
    whole: bool = False

    @property
    def reason(self) -> str:
        """What was left out, in a sentence of the report."""
        if self.whole:
            return "left out as a whole"
        places = ", ".join(f"{rewrite.number} ({rewrite.rule} at '{rewrite.node}')" for rewrite in self.left_out)
        return f"left out {len(self.left_out)} of {len(self.left_out) + len(self.step.result.rewrites)}: {places}"


def without_guilty(
    step: Step, verdict: Verdict, rerun: Rerun, judge: Callable[[Step], Verdict], progress: Callable[[str], None]
) -> Attempt:
    """Leave out the first rewrite that breaks a budget, then the first of what is left, until the budgets hold.

    Each is found by bisection over the rewrites' numbers. Where rewrites break the budgets only together, or too many
    do, the pass is left out as a whole; where they do not hold even then, the verdict says so.
    """
    every = list(step.result.rewrites)
    attempt = Attempt(step, verdict)
    while attempt.verdict.problems and len(attempt.left_out) < min(MOST_GUILTY, len(every) - 1):
        guilty = _first_guilty(attempt, rerun, judge, progress)
        if guilty is None:
            break
        attempt.left_out.append(guilty)
        refused = [(rewrite.rule, rewrite.node) for rewrite in attempt.left_out]
        attempt.step = rerun(None, refused)
        attempt.verdict = judge(attempt.step)
    if attempt.verdict.problems:
        nothing = replace(step, end=step.start, result=PassResult(), cached=False)
        return Attempt(nothing, judge(nothing), every, whole=True)
    return attempt


def _first_guilty(
    attempt: Attempt, rerun: Rerun, judge: Callable[[Step], Verdict], progress: Callable[[str], None]
) -> Applied | None:
    """The rewrite with which the budgets stop holding; None where one does with nothing rewritten at all."""
    rewrites = attempt.step.result.rewrites
    refused = [(rewrite.rule, rewrite.node) for rewrite in attempt.left_out]
    holds, breaks = 0, len(rewrites)
    while breaks - holds > 1:
        middle = (holds + breaks) // 2
        progress(f"{attempt.step.key} broke a budget: looking for the rewrite, among {breaks - holds}")
        if judge(rerun(rewrites[middle - 1].number, refused)).problems:
            breaks = middle
        else:
            holds = middle
    return rewrites[breaks - 1] if rewrites else None
