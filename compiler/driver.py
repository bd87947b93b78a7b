"""The main job, top to bottom: recipe → load → passes, each verified → target → report."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from llmc.compiler import data, pipeline, versions
from llmc.compiler.artifact import artifact, check_place, write_manifest
from llmc.compiler.cache import builds
from llmc.compiler.cache.keys import key_of
from llmc.compiler.cache.memory import NOTHING, Memory, State, open_memory
from llmc.compiler.cache.store import DamagedError
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.data import Samples
from llmc.compiler.errors import BudgetError, InternalError, LlmcError, PrecisionError, TargetError
from llmc.compiler.evidence import Given, evidence_place, keep_breach, keep_crash, keep_fallback
from llmc.compiler.generation.tokenizer import copy_tokenizer
from llmc.compiler.loaders import Feeds, Loaded, load
from llmc.compiler.loaders.tasks import TEXT_GENERATION
from llmc.compiler.lock import Lock
from llmc.compiler.precision import Asked, fallbacks, some
from llmc.compiler.profiles import check_sizes, declare_inputs, generated_sizes, resolve_profiles, verified_sizes
from llmc.compiler.recipe import Recipe
from llmc.compiler.report import (
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
    write,
)
from llmc.compiler.report.statistics import graph_report
from llmc.compiler.rollback import Attempt, without_guilty
from llmc.compiler.session import Session
from llmc.compiler.targets import BuildRequest, Built, Profile, Progress, Target, resolve
from llmc.compiler.targets.input_shapes import dynamic_dimensions
from llmc.compiler.verification import Verifier
from llmc.compiler.verification.custom import load_custom
from llmc.compiler.verification.judge import REGIONS_SHOWN, Judge, Verdict
from llmc.compiler.verification.tasks import Task
from llmc.passes.base import Ledger, Pass
from llmc.passes.graph import Array, Graph, save_model

NOT_LOCKED = ("recipe.yaml", "report.html", "report.json", "report.md")
"""Files that differ from run to run, or from machine to machine: reports have timings, recipes have paths."""


def _quiet(_phase: str) -> None:
    return None


@dataclass
class Plan:
    """A compile, checked as far as it can be without running it."""

    recipe: Recipe
    loaded: Loaded
    profiles: list[Profile]
    target: Target
    verification: Samples
    calibration: dict[str, Samples]
    """Key of each pass that needs activations → the samples it gets."""
    tokenizer: Path | None
    warnings: list[str]
    seconds: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, object]:
        """What would run, as plain values."""
        loaded = self.loaded
        return {
            "source": {"kind": loaded.kind, "name": loaded.name, "task": loaded.task, "sha256": loaded.digest},
            "nodes": len(loaded.graph.nodes),
            "passes": [{step.key(): step.model_dump(mode="json")} for step in self.recipe.passes],
            "profiles": [{name: [r.min, r.opt, r.max] for name, r in p.items()} for p in self.profiles],
            "verification": {"inputs": self.verification.name, "samples": len(self.verification)},
            "calibration": {key: {"inputs": s.name, "samples": len(s)} for key, s in self.calibration.items()},
            "target": {"kind": self.target.kind, "versions": dict(self.target.versions)},
            "warnings": [*loaded.notes, *self.warnings],
        }


@dataclass
class Run:
    """What a compile has found out so far; the report is made of it."""

    plan: Plan
    judge: Judge
    loaded: pipeline.Step
    output: Path
    progress: Progress = _quiet
    listeners: Sequence[pipeline.Listener] = ()
    stop_after_rewrite: int | None = None
    memory: Memory = NOTHING
    cached: list[str] = field(default_factory=list)
    """Steps that were found in the cache."""
    steps: list[PassReport] = field(default_factory=list)
    asked: Asked = field(default_factory=Asked)
    verification_seconds: dict[str, float] = field(default_factory=dict)
    task: TaskReport | None = None

    def given(self, key: str = "") -> Given:
        """What evidence needs of the compile; `key` is that of a pass whose calibration data it needs."""
        made = self.plan
        return Given(made.verification, made.calibration.get(key), made.tokenizer, self.stop_after_rewrite)

    def activations(self, step: Pass) -> SampledActivations:
        """What a pass that calibrates learns of its data."""
        samples = self.plan.calibration[step.key()]
        loud = samples.random and getattr(step, "calibration", None) is not None
        digest = key_of(samples.digest, len(samples), samples.name, loud, self.loaded.end.digest)
        return SampledActivations(samples, samples.name, random=loud, digest=digest)

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


def with_options(
    recipe: Recipe, *, target: str | None = None, calibration: Path | None = None, verify_inputs: Path | None = None
) -> Recipe:
    """The recipe with the command line's short forms of settings. Raises LlmcError where nothing would use one."""
    if target is not None:
        recipe = recipe.with_values({"target.kind": target}, "--target")
    if verify_inputs is not None:
        recipe = recipe.with_values({"verify.inputs": verify_inputs}, "--verify-inputs")
    if calibration is not None:
        keys = [step.key() for step in recipe.passes if hasattr(step, "calibration")]
        if not keys:
            raise LlmcError(f"--calibration: recipe '{recipe.name}' has no pass that calibrates")
        recipe = recipe.with_values({f"passes.{key}.calibration.data": calibration for key in keys}, "--calibration")
    return recipe


def plan(
    source: str,
    recipe: Recipe | str | Path,
    *,
    tokenizer: Path | None = None,
    offline: bool = False,
    memory: Memory = NOTHING,
    progress: Progress = _quiet,
) -> Plan:
    """Load everything that a compile needs and check all that can be checked without building. Raises LlmcError."""
    started = time.perf_counter()
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    recipe.check_data()
    target = resolve(recipe.target.kind)
    _check_targets(recipe, target)
    progress("loading the model")
    loaded = load(
        source,
        task=recipe.model.task,
        opset=recipe.model.opset,
        cache=recipe.model.cache,
        trust_remote_code=recipe.model.trust_remote_code,
        offline=offline,
        memory=memory,
        progress=progress,
    )
    declare_inputs(loaded.graph, recipe)
    profiles, notes = resolve_profiles(loaded, recipe)
    made = Plan(recipe, loaded, profiles, target, _no_samples(), {}, tokenizer or loaded.tokenizer, notes)
    section = recipe.verify
    sizes = verified_sizes(profiles, section.samples, section.seed)
    made.verification = _samples(made, section.inputs, section.samples, sizes)
    for step in recipe.passes:
        if "activations" in step.needs:
            made.calibration[step.key()] = _calibration(made, step)
    made.seconds["load"] = time.perf_counter() - started
    return made


def compile(  # noqa: A001 - the field's word for it, and the name of the public function
    source: str,
    recipe: Recipe | str | Path,
    output: Path,
    *,
    force: bool = False,
    tokenizer: Path | None = None,
    offline: bool = False,
    stop_after_rewrite: int | None = None,
    listeners: Sequence[pipeline.Listener] = (),
    cached: bool = True,
    lock: Lock | None = None,
    progress: Progress = _quiet,
) -> Report:
    """Compile `source` as `recipe` says into the directory `output`, which is complete afterwards or absent.

    `listeners` are called with each step, the load first. With `cached` nothing is done again that the user's cache
    holds; `lock` is written, or refuses what differs from it. Raises LlmcError for bad input, BudgetError where a step
    moved an output too far, InternalError where a pass crashed and PrecisionError where a layer is not in the
    precision asked for (the evidence is then in `<output>.failed`), TargetError where the target cannot build the
    graph.
    """
    check_place(output, force=force)
    with open_memory(cached) as memory:
        while True:
            with suppress(DamagedError):  # dropped by now: what it held is made anew
                made = plan(source, recipe, tokenizer=tokenizer, offline=offline, memory=memory, progress=progress)
                return _run(made, output, force, stop_after_rewrite, listeners, memory, lock, progress)


def _run(
    made: Plan,
    output: Path,
    force: bool,
    stop_after_rewrite: int | None,
    listeners: Sequence[pipeline.Listener],
    memory: Memory,
    lock: Lock | None,
    progress: Progress,
) -> Report:
    started = time.perf_counter() - made.seconds["load"]
    locked = {**_about(made), "recipe": made.recipe.document(lambda path: path.name)}
    if lock is not None:
        lock.check(locked)
    loaded = pipeline.loaded(made.loaded.graph, memory, on_disk=made.loaded.kind == "onnx")
    verifier = _verifier(made, loaded, memory, progress)
    judge = Judge(made.recipe.verify, verifier, len(made.recipe.passes), memory)
    run = Run(made, judge, loaded, output, progress, listeners, stop_after_rewrite, memory)
    run.cached += ["load"] if made.loaded.cached else []
    _record_load(run, loaded)
    try:
        last = _run_passes(run, loaded)
    except pipeline.PassCrash as crash:
        raise _crashed(run, crash) from crash
    run.task = _task(run, last)
    with artifact(output, force=force) as folder:
        model = folder / "model.onnx"
        graph = last.graph
        save_model(graph, model)
        with run.timed("build"):
            built = _build(run, last.end, model, folder)
        report = _report(run, graph, _target_report(made, built, folder))
        _check_precision(run, graph, report)
        report.timings.total = time.perf_counter() - started
        write(report, folder)
        if made.loaded.task == TEXT_GENERATION and made.loaded.tokenizer is not None:
            copy_tokenizer(made.loaded.tokenizer, folder)
        (folder / "recipe.yaml").write_text(made.recipe.resolved_yaml(), encoding="utf-8")
        files = write_manifest(folder, _about(made))
        locked |= {"outputs": {name: digest for name, digest in files.items() if name not in NOT_LOCKED}}
        if lock is not None:
            lock.check(locked)
    if lock is not None:
        lock.write(locked)
    return report


def _check_targets(recipe: Recipe, target: Target) -> None:
    """Raises LlmcError for a pass whose result the target does not take."""
    for step in recipe.passes:
        if step.targets and target.kind not in step.targets:
            raise LlmcError(
                f"{step.key()} is for target {' or '.join(step.targets)}, and the recipe builds for {target.kind}: "
                "leave the pass out, or set target.kind"
            )


# Samples


def _no_samples() -> Samples:
    return Samples("", "", True, 0, lambda _number: {})


def _samples(made: Plan, path: Path | None, count: int, sizes: Sequence[Mapping[str, int]]) -> Samples:
    """At most `count` samples from `path`, or as many generated ones in turn of `sizes`; each fits a profile."""
    graph = made.loaded.graph
    if path is None:
        section = made.recipe.verify
        vocabulary, ranges = made.loaded.vocabulary, section.ranges
        return data.generate(graph, sizes, vocabulary=vocabulary, seed=section.seed, count=count, ranges=ranges)
    found = data.from_path(path, graph, made.tokenizer, _longest(made)).first(count)
    check_sizes(graph, found, made.profiles, str(path))
    return found


def _longest(made: Plan) -> int | None:
    """Tokens that a text may have; None where nothing limits them."""
    longest = max((p["sequence"].max for p in made.profiles if "sequence" in p), default=None)
    return min((limit for limit in (longest, made.loaded.limits.get("sequence")) if limit is not None), default=None)


def _calibration(made: Plan, step: Pass) -> Samples:
    """What the pass's own parameters name; where they name nothing, the verification samples."""
    wanted = getattr(step, "calibration", None)
    if wanted is None:
        return made.verification
    path = None if wanted.data is None else Path(wanted.data)
    return _samples(made, path, wanted.samples, generated_sizes(made.profiles[0]))


# Passes


def _verifier(made: Plan, loaded: pipeline.Step, memory: Memory, progress: Progress) -> Verifier:
    """Holds graphs against the source model, or the graph as loaded where the source cannot be run."""
    source = made.loaded

    @cache
    def reference() -> Callable[[Feeds], Mapping[str, Array]]:
        progress("running the source model")
        return source.reference or Session(loaded.graph).run

    ran = source.digest if source.reference else ""
    about = (ran, source.task, loaded.end.digest, made.verification.digest, len(made.verification))
    section = made.recipe.verify
    custom = load_custom(section.custom, Path(made.recipe.source.label).parent)
    return Verifier(lambda feeds: reference()(feeds), made.verification, section.asked, memory, about, custom)


def _record_load(run: Run, step: pipeline.Step) -> None:
    """Step 0: the loaded graph against the source model, where the source can be run."""
    found = step.end.statistics
    line = PassReport(index=0, key=step.key, nodes_after=dict(found.operators), weight_bytes_after=found.weight_bytes)
    run.steps.append(line)
    _tell(run, step)
    if run.plan.loaded.reference is not None:
        with run.timed_verification(step):
            line.verified, line.numerics = "full", run.judge.load(step)


def _tell(run: Run, step: pipeline.Step) -> None:
    for listener in run.listeners:
        listener(step)


def _run_passes(run: Run, loaded: pipeline.Step) -> pipeline.Step:
    """Run and verify every pass; the last step."""
    passes = run.plan.recipe.passes
    ledger = Ledger(run.stop_after_rewrite)
    step = loaded
    for index, step_pass in enumerate(passes, start=1):
        run.progress(f"pass {index} of {len(passes)}: {step_pass.key()}")
        step = _run_pass(run, step.end, index, step_pass, ledger)
    return step


def _run_pass(run: Run, start: State, index: int, step_pass: Pass, ledger: Ledger) -> pipeline.Step:
    """Run one pass, verify and judge it."""
    step = pipeline.run_pass(start, index, step_pass, run.activations, ledger, run.memory)
    run.plan.seconds[step.label] = step.seconds
    if step.cached:
        run.cached.append(step.label)
    _tell(run, step)
    with run.timed_verification(step):
        verdict = run.judge.judge(step, step_pass.safety)
    broken, attempt = verdict.problems, None
    if broken and run.plan.recipe.verify.on_failure == "rollback" and step.result.rewrites:
        attempt = _rolled_back(run, step, verdict, step_pass)
        step, verdict = attempt.step, attempt.verdict
    line = _pass_report(step, run.plan.recipe, verdict)
    run.steps.append(line)
    run.asked.remember(step.result)
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
    _tell(run, attempt.step)
    return attempt


def _task(run: Run, last: pipeline.Step) -> TaskReport | None:
    """The measure of the task, of the source model and of the graph. Raises BudgetError where too much was lost."""
    made, section = run.plan, run.plan.recipe.verify.task
    if section is None:
        return None
    run.progress(f"measuring {section.metric}")
    with run.timed("verify"):
        task = Task(section, run.loaded.graph, made.tokenizer, _longest(made))
        source = task.measure(made.loaded.reference or Session(run.loaded.graph).run)
        compiled = task.measure(Session(last.graph).run)
    drop = task.drop(source, compiled)
    if section.max_drop is not None and not drop <= section.max_drop:
        problem = (
            f"{section.metric} went from {source:.4g} to {compiled:.4g}: it loses {drop:.3g}, {section.max_drop:g} may"
        )
        if made.recipe.verify.on_failure != "warn":
            raise BudgetError(f"{problem}.\n`llmc bisect` finds the pass; verify.on_failure: warn goes on")
        made.warnings.append(problem)
    return TaskReport(
        metric=section.metric, data=section.data.name, samples=len(task.rows), source=source, compiled=compiled,
        drop=drop, max_drop=section.max_drop,
    )  # fmt: skip


def _over_budget(run: Run, line: PassReport, step: pipeline.Step, verdict: Verdict) -> None:
    """Stop the compile, evidence kept, or go on with a warning, as the recipe says."""
    recipe = run.plan.recipe
    if recipe.verify.on_failure != "fail":
        line.warnings += verdict.problems
        return
    line.status, line.reason = "over budget", "; ".join(verdict.problems)
    report = _report(run, step.graph, None)
    evidence = evidence_place(run.output)
    command = keep_breach(evidence, recipe, step, run.loaded.before, run.given(), report)
    raise BudgetError(
        f"pass {step.index}, {step.key}, broke the budget: {line.reason}.\n"
        f"The graphs before and after it are in {evidence / 'repro'}; to see it again:\n  {command}"
    )


def _crashed(run: Run, crash: pipeline.PassCrash) -> InternalError:
    """The error to end with, once the evidence is kept: the graph before the pass, and the command that runs it."""
    step = crash.step
    line = _pass_report(step, run.plan.recipe, Verdict())
    line.status, line.reason = "crashed", str(crash)
    run.steps.append(line)
    report = _report(run, step.graph, None)
    evidence = evidence_place(run.output)
    try:
        command = keep_crash(evidence, run.plan.recipe, crash, run.given(step.key), report)
    except Exception:  # what matters is the crash: its traceback goes to whoever called
        raise crash from crash.__cause__
    return InternalError(
        f"{crash}.\nThis is a bug of llmc. The graph before the pass and the traceback are in "
        f"{evidence / 'repro'}; to see it again:\n  {command}"
    )


def _pass_report(step: pipeline.Step, recipe: Recipe, verdict: Verdict) -> PassReport:
    result = step.result
    written = recipe.document()["passes"][step.index - 1]
    return PassReport(
        index=step.index,
        key=step.key,
        status="skipped" if step.skipped else "done",
        reason=step.skipped,
        parameters=written[step.key] if isinstance(written, dict) else {},
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
        warnings=[*result.warnings, *verdict.warnings],
    )


# Target and report


def _build(run: Run, final: State, model: Path, folder: Path) -> Built:
    """Check, then build; every reason against it in one TargetError."""
    made, graph = run.plan, final.graph
    dynamic = dynamic_dimensions(graph)  # a pass may have fixed some: a static cache has one length
    profiles = [{name: sizes for name, sizes in profile.items() if name in dynamic} for profile in made.profiles]
    request = BuildRequest(profiles, made.recipe.target.compute_capabilities, made.recipe.target.workspace)

    def build() -> Built:
        run.progress(f"checking for {made.target.kind}")
        problems = made.target.check(graph, request)
        if problems:
            raise TargetError("\n".join(problems))
        return made.target.build(model, folder, request, run.progress)

    built, cached = builds.recall(run.memory, final, made.target, request, folder, build)
    if cached:
        run.cached.append("build")
    return built


def _target_report(made: Plan, built: Built, folder: Path) -> TargetReport:
    return TargetReport(
        kind=made.target.kind,
        files={path.name: path.stat().st_size for path in sorted({folder / "model.onnx", *built.files})},
        facts=built.facts,
        profiles=[{name: (r.min, r.opt, r.max) for name, r in profile.items()} for profile in made.profiles],
        layers=built.layers,
        warnings=built.warnings,
    )


def _report(run: Run, graph: Graph, target: TargetReport | None) -> Report:
    made, loaded = run.plan, run.plan.loaded
    best = {name: sizes.opt for name, sizes in made.profiles[0].items()}
    precision = run.asked.layers(graph, target.layers if target else ())
    return Report(
        llmc=versions.llmc_version(),
        status=_status(run.steps),
        source=SourceReport(
            kind=loaded.kind, name=loaded.name, sha256=loaded.digest, task=loaded.task, exporter=loaded.exporter
        ),
        recipe=made.recipe.name,
        passes=run.steps,
        graph=graph_report(graph, best),
        precision=precision,
        verification=Verification(
            reference="torch" if loaded.reference is not None else "the loaded graph",
            inputs=made.verification.name,
            samples=len(made.verification),
            budgets=made.recipe.verify.limits(),
            task=run.task,
        ),
        target=target,
        warnings=[*loaded.notes, *made.warnings, *fallbacks(precision)],
        versions=versions.collect(loaded.kind, made.target.versions),
        timings=Timings(total=0.0, steps=made.seconds, verification=run.verification_seconds, cached=run.cached),
    )


def _check_precision(run: Run, graph: Graph, report: Report) -> None:
    """Raise PrecisionError, evidence kept, where layers are not in the precision asked for and nothing said why."""
    made = run.plan
    found = fallbacks(report.precision)
    if not found or made.recipe.verify.on_fallback == "warn":
        return
    report.status = "fell back"
    evidence = evidence_place(run.output)
    command = keep_fallback(evidence, made.recipe, run.loaded.before, graph, run.given(), report)
    raise PrecisionError(
        f"{len(found)} layers are not in the precision that was asked for:{some(found)}\n"
        f"`--set verify.on_fallback=warn` lets it pass. The graph and the report are in {evidence}; to see it again:\n"
        f"  {command}"
    )


def _status(steps: Sequence[PassReport]) -> Literal["done", "rolled back", "over budget", "crashed"]:
    """Of the whole compile: that of the step which ended it; where none did, whether all was done."""
    last = steps[-1].status if steps else "done"
    if last in ("over budget", "crashed"):
        return last
    return "rolled back" if any(step.status == "rolled back" for step in steps) else "done"


def _about(made: Plan) -> dict[str, object]:
    """What the manifest says beside the digests of the artifact's files."""
    return {
        "llmc": versions.llmc_version(),
        "source": {"name": made.loaded.name, "sha256": made.loaded.digest},
        "recipe": {"name": made.recipe.name, "sha256": made.recipe.digest()},
        "verification": {"name": made.verification.name, "sha256": made.verification.digest},
        "calibration": {key: {"name": s.name, "sha256": s.digest} for key, s in made.calibration.items()},
        "versions": versions.collect(made.loaded.kind, made.target.versions),
    }
