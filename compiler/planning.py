"""What a compile will do, checked as far as it can be before anything runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmc.compiler import calibration_file, data, versions
from llmc.compiler.artifact import sha256
from llmc.compiler.cache.keys import code_digest, key_of
from llmc.compiler.cache.memory import NOTHING, Memory
from llmc.compiler.calibration_file import Section, Statistics
from llmc.compiler.data import Samples
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Loaded, load
from llmc.compiler.profiles import check_sizes, declare_inputs, generated_sizes, resolve_profiles, verified_sizes
from llmc.compiler.recipe import Recipe
from llmc.compiler.targets import Profile, Progress, Target, resolve
from llmc.passes.base import Pass
from llmc.passes.graph import shape_of


def quiet(_phase: str) -> None:
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
    statistics: dict[int, Statistics] = field(default_factory=dict)
    """Position of each pass whose recipe names earlier statistics → these."""
    processor: Path | None = None
    """The folder that says how images are prepared."""
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

    def statistics_of(self, step: Pass) -> Statistics | None:
        """Those that a pass of the recipe takes its clipping points from."""
        known = (self.statistics.get(i) for i, other in enumerate(self.recipe.passes) if other is step)
        return next(known, None)

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
            parameters = step.model_dump(mode="json", exclude={"calibration": {"data", "statistics"}})
            data = self.section(index).sha256 if hasattr(step, "calibration") else ""
            before.append([step.key(), parameters, data])
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
            "statistics": {
                s.section.key: {"name": s.path.name, "sha256": sha256(s.path)} for s in self.statistics.values()
            },
            "versions": self.versions(),
        }

    def versions(self) -> dict[str, str]:
        """Package → version: of all that have a say."""
        packages = {name for samples in (self.verification, *self.calibration.values()) for name in samples.packages}
        return versions.collect(self.loaded.kind, self.target.versions, packages)

    def longest(self) -> int | None:
        """Tokens that a text may have; None where nothing limits them."""
        longest = max((p["sequence"].max for p in self.profiles if "sequence" in p), default=None)
        return min(
            (limit for limit in (longest, self.loaded.limits.get("sequence")) if limit is not None), default=None
        )


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
    progress: Progress = quiet,
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
    made.processor = recipe.model.processor or loaded.processor
    section = recipe.verify
    sizes = verified_sizes(profiles, section.samples, section.seed)
    made.verification = _samples(made, section.inputs, section.samples, sizes, memory)
    for step in recipe.passes:
        if "activations" in step.needs:
            made.calibration[step.key()] = _calibration(made, step, memory)
    for position, step in enumerate(recipe.passes):
        path = getattr(getattr(step, "calibration", None), "statistics", None)
        if path is not None:
            made.statistics[position] = calibration_file.read(path, loaded.digest, step.key(), made.history(position))
    made.seconds["load"] = time.perf_counter() - started
    return made


def _check_targets(recipe: Recipe, target: Target) -> None:
    """Raises LlmcError for a pass whose result the target does not take."""
    for step in recipe.passes:
        if step.targets and target.kind not in step.targets:
            reason = f" ({step.targets_reason})" if step.targets_reason else ""
            raise LlmcError(
                f"{step.key()} is for target {' or '.join(step.targets)}, and the recipe builds for {target.kind}: "
                f"leave the pass out, or set target.kind{reason}"
            )


def _no_samples() -> Samples:
    return Samples("", "", True, 0, lambda: ())


def _samples(made: Plan, path: Path | None, count: int, sizes: Sequence[Mapping[str, int]], memory: Memory) -> Samples:
    """At most `count` samples from `path`, or as many generated ones in turn of `sizes`; each fits a profile."""
    graph = made.loaded.graph
    if path is None:
        section = made.recipe.verify
        vocabulary, ranges = made.loaded.vocabulary, section.ranges
        return data.generate(graph, sizes, vocabulary=vocabulary, seed=section.seed, count=count, ranges=ranges)
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
    path = None if wanted.data is None else Path(wanted.data)
    return _samples(made, path, wanted.samples, generated_sizes(made.profiles[0]), memory)
