"""What a compile will do, checked as far as it can be before anything runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmc.compiler import calibration_file, data, versions
from llmc.compiler.cache.keys import code_digest, key_of
from llmc.compiler.cache.memory import NOTHING, Memory
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.calibration_file import Section, Statistics
from llmc.compiler.data import Samples
from llmc.compiler.data.own_cache import with_own_cache
from llmc.compiler.data.text import is_past
from llmc.compiler.digest import sha256
from llmc.compiler.errors import LlmcError, TwoGraphsError
from llmc.compiler.half import has_halves
from llmc.compiler.loaders import HALVES, Loaded, load
from llmc.compiler.profiles import (
    affordable,
    check_sizes,
    declare_inputs,
    generated_sizes,
    resolve_profiles,
    verified_sizes,
)
from llmc.compiler.progress import Progress, quiet
from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.compiler.targets import Profile, Target, resolve
from llmc.passes.base import Pass
from llmc.passes.graph import Array, Graph, shape_of
from llmc.passes.plugins import PluginPass

_PATHS: Any = {"calibration": {"data", "statistics"}, "judge": {"data"}}
"""Parameters of passes that say where data is, not what."""


@dataclass
class Plan:
    """A compile, checked as far as it can be without running it."""

    recipe: Recipe
    loaded: Loaded
    profiles: list[Profile]
    target: Target
    verification: Samples
    calibration: dict[str, Samples]
    """Key of each pass that needs activations → the samples it gets, in all."""
    tokenizer: Path | None
    warnings: list[str]
    statistics: dict[int, Statistics] = field(default_factory=dict)
    """Position of each pass whose recipe names earlier statistics → these."""
    processor: Path | None = None
    """The folder that says how images are prepared."""
    judging: dict[str, Samples] = field(default_factory=dict)
    """Key of each pass that judges what it does on data of its own → the samples of that."""
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
            "judging": {key: {"inputs": s.name, "samples": len(s)} for key, s in self.judging.items()},
            "target": {"kind": self.target.kind, "versions": dict(self.target.versions)},
            "warnings": [*loaded.notes, *self.warnings],
        }

    def expected(self, samples: Iterable[Mapping[str, Array]]) -> Iterator[Mapping[str, Array]]:
        """For each sample the outputs of the source model; of the graph as loaded where the source cannot be run."""
        source = self.loaded.reference
        return map(source, samples) if source else Session(self.loaded.graph).run_each(samples)

    def statistics_of(self, step: Pass) -> Statistics | None:
        """Those that a pass of the recipe takes its clipping points from."""
        known = (self.statistics.get(i) for i, other in enumerate(self.recipe.passes) if other is step)
        return next(known, None)

    def samples_of(self, step: Pass) -> tuple[Samples, Samples | None]:
        """Those that a pass calibrates on, and those that it judges what it does on, if it does.

        Without data of their own these are what follows the former; where there are too few, each gets its share.
        """
        key, judge, calibration = step.key(), getattr(step, "judge", None), getattr(step, "calibration", None)
        samples = self.calibration[key]
        if judge is None or calibration is None or key in self.judging:
            return samples, self.judging.get(key)
        first = len(samples) * calibration.samples // (calibration.samples + judge.samples)
        return samples.first(first), samples.after(first)

    def activations(self, step: Pass, graph: str | None = None, memory: Memory = NOTHING) -> SampledActivations:
        """What a pass that needs activations learns of its data.

        `graph` is the digest of the loaded graph; without it nothing is remembered.
        """
        samples, judged = self.samples_of(step)
        loud = samples.random and getattr(step, "calibration", None) is not None
        known = self.statistics_of(step)
        parts = [samples.digest, len(samples), samples.name, loud, graph, known]
        parts += [] if judged is None else [judged.digest, len(judged)]
        return SampledActivations(
            samples,
            samples.name,
            random=loud,
            digest=None if graph is None else key_of(*parts),
            known=known,
            memory=memory,
            held_out=None if judged is None else SampledActivations(judged, judged.name),
        )

    def section(self, position: int) -> Section:
        """Which statistics the pass at `position` of the recipe makes, or takes; without its tensors."""
        if position in self.statistics:
            return self.statistics[position].section
        key = self.recipe.passes[position].key()
        samples = self.calibration[key]
        return Section(key, self.history(position), samples.name, samples.digest)

    def history(self, position: int) -> str:
        """Digest of the passes before `position` and of what they calibrate on: what tensors look like there."""
        before: list[object] = []
        for index, step in enumerate(self.recipe.passes[:position]):
            parameters = step.model_dump(mode="json", exclude=_PATHS)
            data = self.section(index).sha256 if hasattr(step, "calibration") else ""
            judging = [self.judging[step.key()].digest] if step.key() in self.judging else []
            before.append([step.key(), parameters, data, *judging])
        return key_of(before)

    def about(self) -> dict[str, object]:
        """What the manifest says beside the digests of the artifact's files."""
        loaded = self.loaded
        return {
            "llmc": versions.llmc_version(),
            "source": {"name": loaded.name, "sha256": loaded.digest},
            "recipe": {"name": self.recipe.name, "sha256": self.recipe.digest()},
            "verification": {"name": self.verification.name, "sha256": self.verification.digest},
            "calibration": {key: {"name": s.name, "sha256": s.digest} for key, s in self.calibration.items()},
            "judging": {key: {"name": s.name, "sha256": s.digest} for key, s in self.judging.items()},
            "statistics": {
                s.section.key: {"name": s.path.name, "sha256": sha256(s.path)} for s in self.statistics.values()
            },
            "versions": self.versions(),
        }

    def versions(self) -> dict[str, str]:
        """Package → version: of all that have a say."""
        data = (self.verification, *self.calibration.values(), *self.judging.values())
        packages = {name for samples in data for name in samples.packages}
        return versions.collect(self.loaded.kind, self.target.versions, packages)

    def longest(self) -> int | None:
        """Tokens that a text may have; None where nothing limits them."""
        name = "encoder_sequence" if self.loaded.half == "encoder" else "sequence"
        longest = max((p[name].max for p in self.profiles if name in p), default=None)
        return min((limit for limit in (longest, self.loaded.limits.get(name)) if limit is not None), default=None)


def with_options(
    recipe: Recipe,
    *,
    target: str | None = None,
    calibration: Path | None = None,
    verify_inputs: Path | None = None,
    link_weights: bool = False,
) -> Recipe:
    """The recipe with the command line's short forms of settings. Raises LlmcError where nothing would use one."""
    if target is not None:
        recipe = recipe.with_values({"target.kind": target}, "--target")
    if link_weights:
        recipe = recipe.with_values({"target.link_weights": True}, "--link-weights")
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
    progress: Progress = quiet,
) -> Plan:
    """Load everything that a compile needs and check all that can be checked without building. Raises LlmcError."""
    started = time.perf_counter()
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    recipe.check_data()
    target = resolve(recipe.target.kind)
    _check_targets(recipe, target)
    recipe = _with_plugins(recipe)
    progress("loading the model")
    loaded = load(
        source,
        task=recipe.model.task,
        opset=recipe.model.opset,
        cache=recipe.model.cache,
        half=recipe.model.half,
        trust_remote_code=recipe.model.trust_remote_code,
        offline=offline,
        memory=memory,
        progress=progress,
    )
    declare_inputs(loaded.graph, recipe)
    recipe = _with_half_budgets(recipe, loaded.graph)
    profiles, notes = resolve_profiles(loaded, recipe)
    made = Plan(recipe, loaded, profiles, target, _no_samples(), {}, tokenizer or loaded.tokenizer, notes)
    made.processor = recipe.model.processor or loaded.processor
    section = recipe.verify
    sizes = verified_sizes(profiles, section.samples, section.seed)
    made.verification = _samples(made, section.inputs, section.samples, sizes, memory)
    for step in recipe.passes:
        if "activations" in step.needs:
            made.calibration[step.key()] = _calibration(made, step, memory)
            judge = getattr(step, "judge", None)
            if judge is not None and judge.data is not None:
                made.judging[step.key()] = _samples(made, judge.data, judge.samples, (), memory)
    made.warnings += _flattered(made)
    for position, step in enumerate(recipe.passes):
        path = getattr(getattr(step, "calibration", None), "statistics", None)
        if path is not None:
            made.statistics[position] = calibration_file.read(path, loaded.digest, step.key(), made.history(position))
    made.seconds["load"] = time.perf_counter() - started
    return made


def plans(
    source: str,
    recipe: Recipe | str | Path,
    *,
    tokenizer: Path | None = None,
    offline: bool = False,
    memory: Memory = NOTHING,
    progress: Progress = quiet,
) -> list[Plan]:
    """The plan of each graph that the source makes, in the order in which they run: two of an encoder-decoder."""
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)

    def planned(wanted: Recipe) -> Plan:
        return plan(source, wanted, tokenizer=tokenizer, offline=offline, memory=memory, progress=progress)

    try:
        return [planned(recipe)]
    except TwoGraphsError:
        if recipe.verify.task is not None:
            place = recipe.where("verify", "task")
            raise LlmcError(
                f"{place}: {source} makes two graphs, and a task is measured of one alone: leave it out, and measure "
                "what both make with `llmc eval`"
            ) from None
        return [planned(recipe.with_values({"model.half": half})) for half in HALVES]


def asked_of(made: Sequence[Plan]) -> Recipe:
    """The recipe of all these plans."""
    recipe = made[0].recipe
    return recipe if len(made) == 1 else recipe.with_values({"model.half": None})


def about(made: Sequence[Plan]) -> dict[str, object]:
    """What the manifest says beside the digests of files; of several graphs what differs stands under their names."""
    if len(made) == 1:
        return made[0].about()
    recipe = asked_of(made)
    named = {"recipe": {"name": recipe.name, "sha256": recipe.digest()}}
    first, *_ = found = [one.about() | named for one in made]
    shared = {key: value for key, value in first.items() if all(other[key] == value for other in found)}
    halves = {
        str(one.loaded.half): {key: value for key, value in other.items() if key not in shared}
        for one, other in zip(made, found, strict=True)
    }
    return {**shared, "graphs": halves}


def summary_of(made: Sequence[Plan]) -> dict[str, object]:
    """What would run, as plain values; of several graphs under their names."""
    return made[0].summary() if len(made) == 1 else {str(one.loaded.half): one.summary() for one in made}


def _check_targets(recipe: Recipe, target: Target) -> None:
    """Raises LlmcError for a pass whose result the target does not take."""
    for step in recipe.passes:
        if step.targets and target.kind not in step.targets:
            reason = f" ({step.targets_reason})" if step.targets_reason else ""
            raise LlmcError(
                f"{step.key()} is for target {' or '.join(step.targets)}, and the recipe builds for {target.kind}: "
                f"leave the pass out, or set target.kind{reason}"
            )

    if recipe.target.plugins and target.kind not in ("tensorrt", "onnx"):
        raise LlmcError(
            f"target.plugins: target {target.kind} runs no plugins: leave target.plugins out, or set target.kind "
            "to tensorrt, or to onnx for an engine that is built elsewhere"
        )


def _with_half_budgets(recipe: Recipe, graph: Graph) -> Recipe:
    """The recipe with the budgets that hold for a graph that comes in half precision, where it does."""
    limits = recipe.verify.half_budgets.limits() if has_halves(graph) else {}
    values = {f"verify.budgets.{metric}": limit for metric, limit in limits.items()}
    return recipe.with_values(values, "verify.half_budgets")


def _with_plugins(recipe: Recipe) -> Recipe:
    """The recipe whose passes know which plugins the target runs."""
    known = {"plugins": recipe.target.plugins}
    passes = tuple(p.model_copy(update=known) if isinstance(p, PluginPass) else p for p in recipe.passes)
    return replace(recipe, passes=passes)


def _no_samples() -> Samples:
    return Samples("", "", True, 0, lambda: ())


def _samples(made: Plan, path: Path | None, count: int, sizes: Sequence[Mapping[str, int]], memory: Memory) -> Samples:
    """At most `count` samples from `path`, or as many generated ones in turn of `sizes`; each fits a profile."""
    graph, half = made.loaded.graph, made.loaded.half
    if path is not None and half is not None:
        path = path / half if (path / half).is_dir() else path
        if half == "decoder" and path.name != half:
            raise LlmcError(
                f"{path} says nothing of what the decoder takes from the encoder: give a folder with a folder of .npz "
                "files for each graph, encoder/ and decoder/"
            )
    if path is None:
        section = made.recipe.verify
        vocabulary, ranges = made.loaded.vocabulary, section.ranges
        cut = affordable(graph, made.profiles, sizes)
        note = "generated samples are small, for the model is large: give larger ones with verify.inputs"
        if cut != list(sizes) and note not in made.warnings:
            made.warnings.append(note)
        found = data.generate(graph, cut, vocabulary=vocabulary, seed=section.seed, count=count, ranges=ranges)
        real = any(step.real_caches for step in made.recipe.passes) and not any(map(is_past, ranges))
        return with_own_cache(found, graph) if real else found
    found = data.from_path(path, graph, made.tokenizer, made.longest(), made.processor, count)
    inputs = [(tensor.name, str(tensor.dtype), shape_of(tensor)) for tensor in graph.inputs]
    parts = (
        found.digest,
        len(found),
        inputs,
        made.profiles,
        code_digest(data.__name__),
        versions.installed(["tokenizers"]),
    )
    if memory.find("samples", *parts) is None:
        check_sizes(graph, found, made.profiles, str(path))
        memory.keep("samples", parts, {})
    return found


def _calibration(made: Plan, step: Pass, memory: Memory) -> Samples:
    """What the pass's own parameters name; where they name nothing, the verification samples."""
    wanted = getattr(step, "calibration", None)
    if wanted is None:
        return made.verification
    judge = getattr(step, "judge", None)
    held_out = judge.samples if judge is not None and judge.data is None else 0
    path = None if wanted.data is None else Path(wanted.data)
    return _samples(made, path, wanted.samples + held_out, generated_sizes(made.profiles[0]), memory)


def _flattered(made: Plan) -> Iterator[str]:
    """Where a pass judges what it does on samples that it, or one before it, has calibrated on."""
    steps = [step for step in made.recipe.passes if "activations" in step.needs and hasattr(step, "calibration")]
    for index, step in enumerate(steps):
        data, apart = made.calibration[step.key()], made.judging.get(step.key())
        if not hasattr(step, "judge") or data.random:
            continue
        free = 0 if apart else len(made.samples_of(step)[0])
        judged = apart or data
        for other in steps[: index + 1]:
            seen = made.samples_of(other)[0]
            if seen.digest == judged.digest and len(seen) > free:
                less = f", or let {other.key()} take {free} (calibration.samples)" if free else ""
                yield (
                    f"{step.key()} judges on samples of {judged.name} that {other.key()} calibrates on, which "
                    f"flatters it: name others in judge.data{less}"
                )
