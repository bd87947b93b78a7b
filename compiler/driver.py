"""The main job, top to bottom: recipe → load → passes, each verified → target → report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from llmc.compiler import calibration_file, disk, pipeline
from llmc.compiler.artifact import artifact, check_place, write_manifest
from llmc.compiler.cache import builds
from llmc.compiler.cache.memory import Memory, State, open_memory
from llmc.compiler.cache.store import DamagedError
from llmc.compiler.dump import PassDump
from llmc.compiler.errors import BudgetError, LlmcError, PrecisionError, TargetError
from llmc.compiler.evidence import evidence_place, keep_fallback, keep_task
from llmc.compiler.generation.tokenizer import copy_tokenizer
from llmc.compiler.links import linkable
from llmc.compiler.loaders import Feeds
from llmc.compiler.loaders.tasks import GENERATING
from llmc.compiler.lock import Lock
from llmc.compiler.peak import peak_bytes
from llmc.compiler.planning import Plan, about, asked_of, plans
from llmc.compiler.precision import fallbacks, some
from llmc.compiler.progress import Counted, Progress, quiet
from llmc.compiler.recipe import Recipe
from llmc.compiler.report import (
    Report,
    TargetReport,
    TaskReport,
    write,
)
from llmc.compiler.run import Run
from llmc.compiler.session import Session
from llmc.compiler.spill import spilling_to
from llmc.compiler.steps import crashed, record_load, run_passes
from llmc.compiler.targets import BuildRequest, Built
from llmc.compiler.targets.input_shapes import dynamic_dimensions
from llmc.compiler.verification import Verifier
from llmc.compiler.verification.custom import load_custom
from llmc.compiler.verification.judge import Judge
from llmc.compiler.verification.tasks import Task
from llmc.passes.graph import SMALL, Array, Graph, collector_paused, constant_bytes, constants, linked_file, save_model

NOT_LOCKED = ("recipe.yaml", "report.html", "report.json", "report.md")
"""Files that differ from run to run, or from machine to machine: reports have timings, recipes have paths."""


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
    progress: Progress = quiet,
) -> Report:
    """Compile `source` as `recipe` says into the directory `output`, which is complete afterwards or absent.

    `listeners` are called with each step, the load first. With `cached` nothing is done again that the user's cache
    holds; `lock` is written, or refuses what differs from it. Raises LlmcError for bad input, BudgetError where a step
    moved an output too far, InternalError where a pass crashed and PrecisionError where a layer is not in the
    precision asked for (the evidence is then in `<output>.failed`), TargetError where the target cannot build the
    graph.
    """
    check_place(output, force=force)
    with open_memory(cached) as memory, spilling_to(output.parent):
        while True:
            with suppress(DamagedError):  # dropped by now: what it held is made anew
                made = plans(source, recipe, tokenizer=tokenizer, offline=offline, memory=memory, progress=progress)
                with collector_paused():
                    return _run(made, output, force, stop_after_rewrite, listeners, memory, lock, progress)


def _run(
    made: Sequence[Plan],
    output: Path,
    force: bool,
    stop_after_rewrite: int | None,
    listeners: Sequence[pipeline.Listener],
    memory: Memory,
    lock: Lock | None,
    progress: Progress,
) -> Report:
    if len(made) > 1 and any(isinstance(listener, PassDump) for listener in listeners):
        raise LlmcError(
            "--dump-passes is of one graph, and the model makes two: name one with --set model.half=encoder or decoder"
        )
    started = time.perf_counter() - sum(one.seconds["load"] for one in made)
    recipe = asked_of(made)
    locked = {**about(made), "recipe": recipe.document(lambda path: path.name)}
    if lock is not None:
        lock.check(locked)
    linked = _make_room(made, output, memory)
    changed = [_change(one, output, stop_after_rewrite, listeners, memory, progress) for one in made]
    disk.check_room([last.graph for _, last in changed], output, linked)
    with artifact(output, force=force) as folder:
        reports = [
            _emit(run, last, folder / (run.plan.loaded.half or "") if len(made) > 1 else folder, linked)
            for run, last in changed
        ]
        report = _together(reports)
        report.timings.total = time.perf_counter() - started
        write(report, folder)
        source = made[-1].loaded
        if source.task in GENERATING and source.tokenizer is not None:
            copy_tokenizer(source.tokenizer, folder)
        (folder / "recipe.yaml").write_text(recipe.resolved_yaml(), encoding="utf-8")
        files = write_manifest(folder, about(made), progress)
        locked |= {"outputs": {name: digest for name, digest in files.items() if name not in NOT_LOCKED}}
        if lock is not None:
            lock.check(locked)
    if lock is not None:
        lock.write(locked)
    return report


def _make_room(made: Sequence[Plan], output: Path, memory: Memory) -> frozenset[Path]:
    """Have the disk hold the output, as far as is known before passes have run; the source's files to be linked.

    Raises LlmcError where it cannot, or these cannot.
    """
    graphs, asked = [one.loaded.graph for one in made], made[0].recipe.target
    linked = linkable(graphs, output, made[0].target.kind) if asked.link_weights else frozenset()
    if asked.link_weights and not linked:
        made[0].warnings.append("no weight of the source stands in a file as ONNX takes it: nothing is linked")
    disk.check_least(graphs, output, linked)
    engine = made[0].target.kind in ("tensorrt", "tensorrt-rtx")  # of about the size of the model beside it
    memory.leave(sum(disk.bytes_to_write(graph, output, linked) for graph in graphs) * (1 + engine), output)
    return linked


def _change(
    made: Plan,
    output: Path,
    stop_after_rewrite: int | None,
    listeners: Sequence[pipeline.Listener],
    memory: Memory,
    progress: Progress,
) -> tuple[Run, pipeline.Step]:
    """Run and verify the passes of one graph; what was found out, and the last step."""
    loaded = pipeline.loaded(made.loaded.graph, memory, on_disk=made.loaded.kind == "onnx", files=made.loaded.files)
    verifier = _verifier(made, loaded, memory, progress)
    judge = Judge(made.recipe.verify, verifier, len(made.recipe.passes), memory)
    run = Run(made, judge, loaded, output, progress, listeners, stop_after_rewrite, memory)
    run.cached += ["load"] if made.loaded.cached else []
    record_load(run, loaded)
    try:
        last = run_passes(run, loaded)
    except pipeline.PassCrash as crash:
        raise crashed(run, crash) from crash
    _measure_task(run, last)
    return run, last


def _emit(run: Run, last: pipeline.Step, folder: Path, linked: frozenset[Path]) -> Report:
    """Write one graph, and what the target makes of it, into `folder`."""
    made, graph = run.plan, last.graph
    folder.mkdir(exist_ok=True)
    model = folder / "model.onnx"
    files = save_model(graph, model, wrote=_counted(graph, linked, run.progress), linked=linked)
    with run.timed("build"):
        built = _build(run, last.end, model, folder)
    report = run.report(graph, _target_report(made, built, [*files, *built.files]))
    _check_precision(run, graph, report)
    report.timings.total = sum(made.seconds.values())
    most = {"llmc": peak_bytes(), "builder": built.peak_bytes}
    report.timings.memory = {process: size for process, size in most.items() if size is not None}
    calibration_file.write(folder, made.loaded.digest, run.sections)
    return report


def _counted(graph: Graph, linked: frozenset[Path], progress: Progress) -> Counted:
    """Counts the weights that are written, not left where they are."""
    written = [constant for constant in constants(graph) if linked_file(constant._values, linked) is None]
    sizes = [size for size in map(constant_bytes, written) if size >= SMALL]
    return Counted(progress, "writing the model", sum(sizes), len(sizes), "weight")


def _together(reports: Sequence[Report]) -> Report:
    """One report: of an encoder-decoder that of the decoder, with the encoder's inside."""
    *encoder, report = reports
    if encoder:
        report.encoder = encoder[0]
        for one in reports:
            if one.target is not None:
                one.target.files = {f"{one.source.half}/{name}": size for name, size in one.target.files.items()}
        if encoder[0].status != "done":
            report.status = encoder[0].status
    return report


def _verifier(made: Plan, loaded: pipeline.Step, memory: Memory, progress: Progress) -> Verifier:
    """Holds graphs against the source model, or the graph as loaded where the source cannot be run."""
    source = made.loaded

    def reference(samples: Iterable[Feeds]) -> Iterable[Mapping[str, Array]]:
        progress("running the source model")
        return made.expected(samples)

    ran = source.digest if source.reference else ""
    about = (ran, source.task, loaded.end.digest, made.verification.digest, len(made.verification))
    section = made.recipe.verify
    custom = load_custom(section.custom, Path(made.recipe.source.label).parent)
    return Verifier(reference, made.verification, section.asked, memory, about, custom)


def _measure_task(run: Run, last: pipeline.Step) -> None:
    """The measure of the task, of the source model and of the graph. Raises BudgetError where too much was lost."""
    made, section = run.plan, run.plan.recipe.verify.task
    if section is None:
        return
    run.progress(f"measuring {section.metric}")
    with run.timed("verify"):
        task = Task(section, run.loaded.graph, made.tokenizer, made.longest())
        source = task.measure(made.loaded.reference or Session(run.loaded.graph).run)
        compiled = task.measure(Session(last.graph).run)
    drop = task.drop(source, compiled)
    run.task = TaskReport(
        metric=section.metric, data=section.data.name, samples=len(task.rows), source=source, compiled=compiled,
        drop=drop, max_drop=section.max_drop,
    )  # fmt: skip
    if section.max_drop is not None and not drop <= section.max_drop:
        problem = (
            f"{section.metric} went from {source:.4g} to {compiled:.4g}: it loses {drop:.3g}, {section.max_drop:g} may"
        )
        if made.recipe.verify.on_failure != "warn":
            raise _task_lost(run, last, problem)
        made.warnings.append(problem)


def _task_lost(run: Run, last: pipeline.Step, problem: str) -> BudgetError:
    """The error to end with, once the evidence is kept."""
    evidence = evidence_place(run.output)
    report = run.report(last.graph, None)
    report.status = "over budget"
    command = keep_task(evidence, run.plan.recipe, run.loaded.before, last.graph, run.given(), report)
    return BudgetError(
        f"{problem}.\n`llmc bisect` finds the pass; verify.on_failure: warn goes on. The graphs before and after all "
        f"passes are in {evidence / 'repro'}; to see it again:\n  {command}"
    )


def _build(run: Run, final: State, model: Path, folder: Path) -> Built:
    """Check, then build; every reason against it in one TargetError."""
    made, graph = run.plan, final.graph
    dynamic = dynamic_dimensions(graph)  # a pass may have fixed some: a static cache has one length
    profiles = [{name: sizes for name, sizes in profile.items() if name in dynamic} for profile in made.profiles]
    asked = made.recipe.target
    request = BuildRequest(profiles, asked.compute_capabilities, asked.workspace, asked.plugins)

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


def _target_report(made: Plan, built: Built, files: Sequence[Path]) -> TargetReport:
    return TargetReport(
        kind=made.target.kind,
        files={path.name: path.stat().st_size for path in sorted(set(files))},
        facts=built.facts,
        profiles=[{name: (r.min, r.opt, r.max) for name, r in profile.items()} for profile in made.profiles],
        layers=built.layers,
        warnings=built.warnings,
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
