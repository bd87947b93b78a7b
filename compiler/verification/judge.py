"""Verifies each step in the recipe's mode, and says whether its budgets hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmc.compiler.cache.memory import NOTHING, Memory
from llmc.compiler.pipeline import Step
from llmc.compiler.recipe.sections import VerifySection
from llmc.compiler.report import OutputNumerics, RegionReport
from llmc.compiler.verification.budgets import breaches
from llmc.compiler.verification.full import Verifier
from llmc.compiler.verification.local import LocalComparison, LocalVerifier, rounding_of
from llmc.compiler.verification.regions import Side, changed_regions
from llmc.passes.base import LlmcError, Safety

REGIONS_SHOWN = 8
"""Of a step, in reports."""
SUSPICIOUS = 1e-2
"""Relative L2 error of a region that no pass which is not lossy may cause."""


@dataclass
class Verdict:
    """What is known of a step once it has been verified."""

    verified: Literal["", "local", "full"] = ""
    numerics: list[OutputNumerics] = field(default_factory=list)
    """Of the whole graph against the reference; empty where it was not run."""
    comparison: LocalComparison | None = None
    problems: list[str] = field(default_factory=list)
    """Budgets that do not hold."""
    warnings: list[str] = field(default_factory=list)

    @property
    def regions(self) -> list[RegionReport]:
        """The regions that were compared, the furthest moved first."""
        return self.comparison.regions if self.comparison else []


class Judge:
    """Verifies the steps of one run, in their order.

    Budgets mean the same in every mode: they hold for the outputs of the whole graph, against the reference. `local`
    runs the whole graph only where a region moved by more than rounding or than a budget allows, where a pass that
    has a budget of its own changed a bit, where a step changed most of the graph, and after the last step.
    """

    def __init__(self, section: VerifySection, verifier: Verifier, steps: int, memory: Memory = NOTHING) -> None:
        self.section, self.verifier, self.memory = section, verifier, memory
        self.steps = steps
        self.last_numerics: list[OutputNumerics] = []
        self.compared = False
        """Whether the whole of the graph, as it is now, has been compared."""
        self.local: LocalVerifier | None = None
        """Holds what was captured, once something was."""

    def load(self, step: Step) -> list[OutputNumerics]:
        """Compare the loaded graph with the source model."""
        self.last_numerics, self.compared = self.verifier.measure(step.end), True
        return self.last_numerics

    def judge(self, step: Step, safety: Safety) -> Verdict:
        """Verify `step` as if it was the next one; `accept` makes it that."""
        verdict = Verdict()
        changed = bool(step.result.rewrites)
        last = step.index == self.steps
        if changed and self.section.mode == "full":
            self._full(step, verdict)
        if changed and self.section.mode == "local":
            self._local(step, verdict, safety)
        if last and not verdict.numerics and (changed or not self.compared):
            self._run_whole(step, verdict)
        verdict.problems = breaches(verdict.numerics, self.section.limits(step.key), self.section.custom)
        return verdict

    def accept(self, step: Step, verdict: Verdict) -> None:
        """Go on from the graph of `step`."""
        if verdict.numerics:
            self.last_numerics, self.compared = verdict.numerics, True
        elif step.result.rewrites:
            self.compared = False
        if step.result.rewrites and self.local is not None:
            self.local.accept(step.end.structure, verdict.comparison)

    def _full(self, step: Step, verdict: Verdict) -> None:
        """Run the whole graph, unless it is the graph before but for names and dead nodes."""
        same = not any(region.outputs for region in changed_regions(Side(step.before), Side(step.end.structure)))
        if same and self.last_numerics:
            verdict.verified, verdict.numerics = "full", self.last_numerics
        else:
            self._run_whole(step, verdict)

    def _local(self, step: Step, verdict: Verdict, safety: Safety) -> None:
        verdict.comparison = self._compared(step)
        if verdict.comparison is not None and self._settled(verdict.comparison, step):
            verdict.verified = "local"
            return
        self._run_whole(step, verdict)
        worst = next(iter(verdict.regions), None)
        if worst is not None and worst.relative_l2 > SUSPICIOUS and safety != "lossy":
            node = next(iter((*worst.nodes, *worst.replaced)), "")
            verdict.warnings.append(
                f"it is {_CLAIMS[safety]}, and moved '{worst.outputs[0].output}' at '{node}' "
                f"by {worst.relative_l2:.2g} (relative L2)"
            )

    def _compared(self, step: Step) -> LocalComparison | None:
        """The comparison of the step's regions, as the cache has it or made now; None where it says nothing."""
        start, end = step.start.digest, step.end.digest
        parts = (start, end, self.verifier.about)
        found = self.memory.find("regions", *parts) if start and end else None
        if found is not None:
            regions = found.value["regions"]
            return None if regions is None else LocalComparison([_region(region) for region in regions])
        self.local = self.local or LocalVerifier(self.verifier.samples)
        try:
            comparison = self.local.compare(step.before, step.end.structure)
        except LlmcError:  # a region that cannot run alone: the whole graph can, or says why it cannot
            return None
        if start and end:
            regions = None if comparison is None else [_plain(region) for region in comparison.regions]
            self.memory.keep("regions", parts, {"regions": regions})
        return comparison

    def _settled(self, comparison: LocalComparison, step: Step) -> bool:
        """Whether the regions say enough: the same bits, or rounding that no budget forbids."""
        if comparison.is_exact:
            return True
        moved = [output for region in comparison.regions for output in region.outputs if output.max_abs]
        forbidden = step.key in self.section.pass_budgets or breaches(moved, self.section.limits(step.key))
        return not forbidden and comparison.is_rounding(rounding_of(step.end.structure))

    def _run_whole(self, step: Step, verdict: Verdict) -> None:
        verdict.verified, verdict.numerics = "full", self.verifier.measure(step.end)


def _plain(region: RegionReport) -> dict[str, object]:
    return {**dict(region), "outputs": [dict(output) for output in region.outputs]}


def _region(value: Mapping[str, Any]) -> RegionReport:
    return RegionReport(**{**value, "outputs": [OutputNumerics.model_construct(**line) for line in value["outputs"]]})


_CLAIMS: dict[Safety, str] = {"exact": "exact", "tolerance": "exact but for rounding", "lossy": "lossy"}
