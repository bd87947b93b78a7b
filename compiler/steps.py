"""The passes of a compile: each one run, verified, and judged."""

from __future__ import annotations

from collections.abc import Collection

from llmc.compiler import pipeline
from llmc.compiler.cache.memory import State
from llmc.compiler.errors import BudgetError, InternalError
from llmc.compiler.evidence import crash_error, evidence_place, keep_breach
from llmc.compiler.report import (
    PassReport,
    RewriteLine,
)
from llmc.compiler.rollback import Attempt, without_guilty
from llmc.compiler.run import Run, pass_report
from llmc.compiler.verification.judge import Verdict
from llmc.passes.base import Ledger, Pass


def record_load(run: Run, step: pipeline.Step) -> None:
    """Step 0: the loaded graph against the source model, where the source can be run."""
    found = step.end.statistics
    line = PassReport(index=0, key=step.key, nodes_after=dict(found.operators), weight_bytes_after=found.weight_bytes)
    run.steps.append(line)
    run.tell(step)
    if run.plan.loaded.reference is not None:
        with run.timed_verification(step):
            line.verified, line.numerics = "full", run.judge.load(step)


def run_passes(run: Run, loaded: pipeline.Step) -> pipeline.Step:
    """Run and verify every pass; the last step. Raises BudgetError, or InternalError where a pass crashed."""
    passes = run.plan.recipe.passes
    ledger = Ledger(run.stop_after_rewrite)
    step = loaded
    for index, step_pass in enumerate(passes, start=1):
        phase = f"pass {index} of {len(passes)}: {step_pass.key()}"
        run.progress(phase)
        with run.memory.telling(run.progress, phase):
            step = _run_pass(run, step.end, index, step_pass, ledger)
    return step


def _run_pass(run: Run, start: State, index: int, step_pass: Pass, ledger: Ledger) -> pipeline.Step:
    """Run one pass, verify and judge it."""
    step = pipeline.run_pass(start, index, step_pass, run.activations, ledger, run.memory)
    run.plan.seconds[step.label] = step.seconds
    if step.cached:
        run.cached.append(step.label)
    run.tell(step)
    with run.timed_verification(step):
        verdict = run.judge.judge(step, step_pass.safety)
    if not verdict.verified:
        del run.verification_seconds[step.label]
    broken, attempt = verdict.problems, None
    if broken and run.plan.recipe.verify.on_failure == "rollback" and step.result.rewrites:
        attempt = _rolled_back(run, step, verdict, step_pass)
        step, verdict = attempt.step, attempt.verdict
    line = pass_report(step, run.plan.recipe, verdict)
    run.steps.append(line)
    run.asked.remember(step.result)
    run.calibrated(step)
    if attempt is not None:
        line.status, line.reason = "rolled back", f"{attempt.reason}, because {'; '.join(broken)}"
        line.left_out = [RewriteLine(**vars(rewrite)) for rewrite in attempt.left_out]
    if verdict.problems:
        _over_budget(run, line, step, verdict)
    run.judge.accept(step, verdict)
    return step


def _rolled_back(run: Run, step: pipeline.Step, verdict: Verdict, step_pass: Pass) -> Attempt:
    """The pass again, without the rewrites that broke a budget."""

    def rerun(stop_after: int | None, refused: Collection[tuple[str, str]]) -> pipeline.Step:
        replay = Ledger(run.stop_after_rewrite if stop_after is None else stop_after, refused)
        replay.taken = step.rewrites_before
        return pipeline.run_pass(step.start, step.index, step_pass, run.activations, replay, run.memory)

    def judge(attempt: pipeline.Step) -> Verdict:
        with run.timed_verification(step):
            return run.judge.judge(attempt, step_pass.safety)

    attempt = without_guilty(step, verdict, rerun, judge, run.progress)
    run.tell(attempt.step)
    return attempt


def _over_budget(run: Run, line: PassReport, step: pipeline.Step, verdict: Verdict) -> None:
    """Stop the compile, evidence kept, or go on with a warning, as the recipe says."""
    recipe = run.plan.recipe
    if recipe.verify.on_failure != "fail":
        line.warnings += verdict.problems
        return
    line.status, line.reason = "over budget", "; ".join(verdict.problems)
    report = run.report(step.graph, None)
    evidence = evidence_place(run.output)
    command = keep_breach(evidence, recipe, step, run.loaded.before, run.given(), report)
    raise BudgetError(
        f"pass {step.index}, {step.key}, broke the budget: {line.reason}.\n"
        f"The graphs before and after it are in {evidence / 'repro'}; to see it again:\n  {command}"
    )


def crashed(run: Run, crash: pipeline.PassCrash) -> InternalError:
    """The error to end with, once the evidence is kept: the graph before the pass, and the command that runs it."""
    step = crash.step
    line = pass_report(step, run.plan.recipe, Verdict())
    line.status, line.reason = "crashed", str(crash)
    run.steps.append(line)
    report = run.report(step.graph, None)
    return crash_error(run.output, run.plan.recipe, crash, run.given(step.key), report)
