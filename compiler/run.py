"""What a compile has found out so far; the report is made of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from llmc.compiler import pipeline, versions
from llmc.compiler.cache.memory import NOTHING, Memory
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.calibration_file import Section
from llmc.compiler.evidence import Given
from llmc.compiler.planning import Plan
from llmc.compiler.precision import Asked, fallbacks
from llmc.compiler.progress import Progress, quiet
from llmc.compiler.recipe import Recipe
from llmc.compiler.report import (
    ActivationLine,
    NearMissLine,
    PassReport,
    Report,
    RewriteLine,
    SourceReport,
    TargetReport,
    TaskReport,
    Timings,
    TradeOffLine,
    Verification,
)
from llmc.compiler.report.statistics import graph_report
from llmc.compiler.verification.judge import REGIONS_SHOWN, Judge, Verdict
from llmc.passes.base import Pass, PassResult
from llmc.passes.graph import Graph


@dataclass
class Run:
    """What a compile has found out so far; the report is made of it."""

    plan: Plan
    judge: Judge
    loaded: pipeline.Step
    output: Path
    progress: Progress = quiet
    listeners: Sequence[pipeline.Listener] = ()
    stop_after_rewrite: int | None = None
    memory: Memory = NOTHING
    cached: list[str] = field(default_factory=list)
    """Steps that were found in the cache."""
    steps: list[PassReport] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    """Of `calibration.json`."""
    asked: Asked = field(default_factory=Asked)
    verification_seconds: dict[str, float] = field(default_factory=dict)
    task: TaskReport | None = None

    def given(self, key: str = "") -> Given:
        """What evidence needs of the compile; `key` is that of a pass whose calibration data it needs."""
        made = self.plan
        calibration, judging = made.calibration.get(key), made.judging.get(key)
        return Given(made.verification, calibration, made.tokenizer, made.processor, judging)

    def activations(self, step: Pass) -> SampledActivations:
        """What a pass that calibrates learns of its data."""
        return self.plan.activations(step, self.loaded.end.digest, self.memory)

    def calibrated(self, step: pipeline.Step) -> None:
        """Keep what a finished step asked of its calibration data."""
        if step.result.calibrated:
            section = self.plan.section(step.index - 1)
            self.sections.append(replace(section, tensors=step.result.calibrated))

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds that the block takes to those of `step`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.plan.seconds[step] = self.plan.seconds.get(step, 0.0) + spent

    @contextmanager
    def timed_verification(self, step: pipeline.Step) -> Iterator[None]:
        """Add the seconds that the block takes to those of verification, and keep those of this step apart."""
        before = self.plan.seconds.get("verify", 0.0)
        with self.timed("verify"):
            yield
        self.verification_seconds[step.label] = self.plan.seconds["verify"] - before

    def tell(self, step: pipeline.Step) -> None:
        """Give a finished step to whoever listens."""
        for listener in self.listeners:
            listener(step)

    def report(self, graph: Graph, target: TargetReport | None) -> Report:
        """All that is known by now; `target` once there is one."""
        made, loaded = self.plan, self.plan.loaded
        best = {name: sizes.opt for name, sizes in made.profiles[0].items()}
        precision = self.asked.layers(graph, target.layers if target else ())
        return Report(
            llmc=versions.llmc_version(),
            status=_status(self.steps),
            source=SourceReport(
                kind=loaded.kind,
                name=loaded.name,
                sha256=loaded.digest,
                task=loaded.task,
                half=loaded.half,
                exporter=loaded.exporter,
            ),
            recipe=made.recipe.name,
            passes=self.steps,
            graph=graph_report(graph, best),
            precision=precision,
            verification=Verification(
                reference="torch" if loaded.reference is not None else "the loaded graph",
                inputs=made.verification.name,
                samples=len(made.verification),
                budgets=made.recipe.verify.limits(),
                task=self.task,
            ),
            target=target,
            warnings=[*loaded.notes, *made.warnings, *fallbacks(precision)],
            versions=made.versions(),
            timings=Timings(total=0.0, steps=made.seconds, verification=self.verification_seconds, cached=self.cached),
        )


def _status(steps: Sequence[PassReport]) -> Literal["done", "rolled back", "over budget", "crashed"]:
    """Of the whole compile: that of the step which ended it; where none did, whether all was done."""
    last = steps[-1].status if steps else "done"
    if last in ("over budget", "crashed"):
        return last
    return "rolled back" if any(step.status == "rolled back" for step in steps) else "done"


def pass_report(step: pipeline.Step, recipe: Recipe, verdict: Verdict) -> PassReport:
    """One step for the report."""
    result = step.result
    return PassReport(
        index=step.index,
        key=step.key,
        status="skipped" if step.skipped else "done",
        reason=step.skipped,
        parameters=recipe.parameters(step.index - 1),
        nodes_before=dict(step.start.statistics.operators),
        nodes_after=dict(step.end.statistics.operators),
        weight_bytes_after=step.end.statistics.weight_bytes,
        rewrites=[RewriteLine(**vars(rewrite)) for rewrite in result.rewrites],
        near_misses=[NearMissLine(**vars(miss)) for miss in result.near_misses],
        kept=result.kept,
        frontier=[TradeOffLine(**(vars(point) | {"left": list(point.left)})) for point in result.frontier],
        verified=verdict.verified,
        numerics=verdict.numerics,
        regions_compared=len(verdict.regions),
        regions=[region for region in verdict.regions if region.relative_l2][:REGIONS_SHOWN],
        activations=[*_activations(result)],
        clipped_weights=result.scales.clipped,
        weight_scales=dict(sorted(result.scales.weights.items())),
        warnings=[*result.warnings, *verdict.warnings],
    )


def _activations(result: PassResult) -> Iterator[ActivationLine]:
    """Those that were quantized as calibration says."""
    for tensor, scale in result.scales.activations.items():
        found, spread = result.calibrated.get(tensor), result.spreads.get(tensor)
        if found is None:
            continue
        line = ActivationLine(tensor=tensor, scale=scale, clip=found.clip, amax=found.amax)
        if spread is not None:
            line.saturated, line.values, line.zeros = spread.saturated, spread.values, spread.zeros
            line.bin_width, line.counts = spread.width, list(spread.counts)
        yield line
