"""Which rewrite, and which layer, moved the outputs too far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from llmc.compiler.artifact import artifact, check_place, write_manifest
from llmc.compiler.blame import growth, plot
from llmc.compiler.blame.replay import Replay
from llmc.compiler.blame.report import Blame, Guilty, Point, Sensitivity
from llmc.compiler.blame.reproducer import smallest_part, write_part
from llmc.compiler.blame.search import Limits, Search, badness
from llmc.compiler.blame.sensitivity import rank
from llmc.compiler.errors import LlmcError
from llmc.compiler.evidence import Given, crash_error
from llmc.compiler.pipeline import PassCrash
from llmc.compiler.planning import Plan
from llmc.compiler.recipe.sections import Metric
from llmc.compiler.session import Session
from llmc.compiler.verification import Verifier, compare
from llmc.compiler.versions import llmc_version
from llmc.passes.base import Pass
from llmc.passes.graph import Graph

Progress = Callable[[str], None]
PREFERRED: tuple[Metric, ...] = ("relative_l2", "cosine", "max_abs", "sqnr_db")


def bisect(
    plan: Plan,
    output: Path,
    *,
    budget: Mapping[str, float] | None = None,
    sensitivity: bool = False,
    scan: bool = False,
    force: bool = False,
    progress: Progress = lambda _phase: None,
) -> Blame:
    """Find the first rewrite of a compile that breaks a budget, and write what shows it into `output`.

    `budget`: metric → limit, in place of the recipe's. `scan` measures after every rewrite instead of bisecting.
    `sensitivity` ranks the layers of each pass that changes precision. Nothing is written where nothing is found.
    Raises LlmcError where no budget is asked for, and InternalError where a pass crashed (the evidence is then in
    `<output>.failed`).
    """
    check_place(output, force=force)
    try:
        return _bisect(plan, output, budget, sensitivity, scan, force, progress)
    except PassCrash as crash:
        key = crash.step.key
        data = plan.calibration.get(key), plan.tokenizer, plan.processor, plan.judging.get(key)
        given = Given(plan.verification, *data)
        raise crash_error(output, plan.recipe, crash, given, None) from crash


def _bisect(
    plan: Plan,
    output: Path,
    budget: Mapping[str, float] | None,
    sensitivity: bool,
    scan: bool,
    force: bool,
    progress: Progress,
) -> Blame:
    investigation = Investigation(plan, budget, progress)
    found = investigation.search.scan() if scan else investigation.search.first_bad()
    blame = investigation.report(found)
    if sensitivity:
        blame.sensitivity = investigation.sensitivity()
    if found is None and not sensitivity:
        return blame
    with artifact(output, force=force) as folder:
        if found:
            investigation.explain(blame, found, folder, output)
        (folder / "blame.json").write_text(blame.model_dump_json(indent=2) + "\n", encoding="utf-8")
        write_manifest(folder, {"llmc": llmc_version(), "status": blame.status})
    return blame


class Investigation:
    """A compile that is being looked into."""

    def __init__(self, plan: Plan, budget: Mapping[str, float] | None, progress: Progress) -> None:
        recipe = plan.recipe
        self.plan, self.progress = plan, progress
        self.limits: Limits = recipe.verify.limits if budget is None else lambda _key: budget
        self.budget = dict(self.limits(None))
        keys = (None, *(step.key() for step in recipe.passes))
        bounded = [metric for key in keys for metric in self.limits(key)]
        if not bounded:
            raise LlmcError(f"recipe '{recipe.name}' has no budget to break: give --metric and its bound")
        self.metric = bounded[0]
        progress("running the source model")
        verifier = Verifier(plan.expected, plan.verification)
        self.replay = Replay(plan.loaded.graph, recipe.passes, self.plan.activations, self._begin)
        self.search = Search(self.replay, verifier, self.limits, progress)

    def report(self, found: int | None) -> Blame:
        """The answer, short of what shows it."""
        search = self.search
        status = "holds" if found is None else "broken" if found else "broken as loaded"
        return Blame(
            status=status,
            source=self.plan.loaded.name,
            recipe=self.plan.recipe.name,
            budget=self.budget,
            rewrites=self.replay.count,
            points=[point for _, point in sorted(search.points.items())],
            monotone=search.monotone(self.metric),
            guilty=self.guilty(found) if found else None,
        )

    def guilty(self, number: int) -> Guilty:
        """Who did rewrite `number`."""
        done, rewrite = self.replay.owner(number), self.replay.rewrite(number)
        before, after = self.search.at(number - 1), self.search.at(number)
        first = number == self.replay.start(done) + 1
        only_pass = first and not self.search.measure(self.replay.partial(done, 0), number).holds
        return Guilty(
            number=number,
            pass_index=done.index,
            key=done.step.key(),
            rule=rewrite.rule,
            node=rewrite.node,
            module=rewrite.module,
            detail=rewrite.detail,
            share=self.share(before, after),
            only_pass=only_pass,
        )

    def share(self, before: Point, after: Point) -> float:
        """Of the error after a rewrite, the part that came with it."""
        metric = next((m for m in (self.metric, *PREFERRED) if m != "sqnr_db"), "relative_l2")
        old, new = badness(before.numerics, metric), badness(after.numerics, metric)
        return 1.0 if math.isinf(new) else (new - old) / new if new else 0.0

    def explain(self, blame: Blame, number: int, folder: Path, output: Path) -> None:
        """Fill in where the error appears and how it grows, and write the plot and the reproducer into `folder`."""
        assert blame.guilty is not None
        before, after = self.around(number, blame.guilty)
        blame.sample = self.worst_sample(after)
        sample = self.search.verifier.samples[blame.sample]
        self.progress("comparing tensor by tensor")
        blame.growth = growth.growth(before, after, sample)
        blame.total = growth.growth(self.replay.graph_after(0), self.replay.final(), sample)
        changed = [error for error in blame.growth if growth.differs(error)]
        blame.appears = next(iter(changed), None)
        blame.not_finite = next((error for error in changed if not error.finite), None)
        (folder / "growth.svg").write_text(plot.svg(blame), encoding="utf-8")
        self.progress("cutting out the smallest part that shows it")
        part = smallest_part(before, after, sample, blame.growth, self.limits(blame.guilty.key))
        if part is not None:
            blame.reproducer = write_part(
                part, folder / "reproducer", output / "reproducer", blame.guilty, self.plan.recipe, len(before.nodes)
            )

    def sensitivity(self) -> list[Sensitivity]:
        """The layers of each pass that asked nodes to have another precision."""
        verifier = self.search.verifier
        return [
            rank(self.replay, done, verifier, self.metric, self.limits(done.step.key()), self.progress)
            for done in self.replay.done
            if done.result.asked
        ]

    def around(self, number: int, guilty: Guilty) -> tuple[Graph, Graph]:
        """The graphs before and after a rewrite."""
        if guilty.only_pass:
            done = self.replay.owner(number)
            return done.before, self.replay.partial(done, 0)
        return self.replay.graph_after(number - 1), self.replay.graph_after(number)

    def worst_sample(self, graph: Graph) -> int:
        """The sample, counted from 0, on which a graph is furthest from the reference."""
        session, verifier = Session(graph), self.search.verifier
        pairs = zip(verifier.expected, session.run_each(verifier.samples), strict=True)
        errors = [badness(compare([pair]), self.metric) for pair in pairs]
        return errors.index(max(errors))

    def _begin(self, index: int, step: Pass) -> None:
        self.progress(f"pass {index} of {len(self.plan.recipe.passes)}: {step.key()}")
