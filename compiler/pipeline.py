"""Runs the passes of a recipe, in its order: one Step each, which verification, progress and report listen to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import onnx

from llmc.compiler.cache.memory import NOTHING, Memory, State
from llmc.compiler.cache.passes import Outcome, PassMemory
from llmc.compiler.cache.store import DamagedError
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.onnx_check import check_without
from llmc.passes.base import Context, Ledger, LlmcError, Pass, PassError, PassResult, Skip
from llmc.passes.graph import Graph, Structure, collector_paused, to_structure

Provider = Callable[[Pass], SampledActivations | None]
"""Gives a pass that needs activations what it needs."""


@dataclass
class Step:
    """One pass that has run: the graph before it (weights shared, not copied) and after it. Step 0 is the load."""

    index: int
    key: str
    start: State
    end: State
    result: PassResult = field(default_factory=PassResult)
    skipped: str = ""
    seconds: float = 0.0
    rewrites_before: int = 0
    """Rewrites that the run had done when the pass began."""
    stop_after: int | None = None
    """Rewrites of the run after which no more may be done."""
    cached: bool = False
    """Whether it was found in the cache, not run."""

    @property
    def before(self) -> Structure:
        """The graph that the pass was given."""
        return self.start.structure

    @property
    def graph(self) -> Graph:
        """The graph that it left, to be looked at: what a listener changed would be lost."""
        return self.end.graph

    @property
    def label(self) -> str:
        """'3 fuse-gelu', or 'load': its name in reports of time."""
        return f"{self.index} {self.key}" if self.index else self.key


Listener = Callable[[Step], None]
"""Called with each step of a run, step 0 first, once it is done and before it is verified."""


class PassCrash(Exception):  # noqa: N818 - the field's word
    """A pass raised what no pass may raise, or left an invalid graph: a bug of llmc. The cause is its exception."""

    def __init__(self, step: Step, error: Exception) -> None:
        super().__init__(f"pass {step.index}, {step.key}, crashed: {type(error).__name__}: {error}")
        self.step = step
        """The step as far as it came: its graph is still the one before."""


def loaded(
    graph: Graph, memory: Memory = NOTHING, *, on_disk: bool = False, files: Mapping[Path, str] = MappingProxyType({})
) -> Step:
    """Step 0: nothing has run yet. Raises PassError where the loader left an invalid graph.

    `on_disk` says that the weights are in the user's own files, and need no second place in the cache; `files` are
    these with the digests that are known of them.
    """
    check_graph(graph, "the loader")
    structure = to_structure(graph)
    state = memory.state(structure, stays=structure.weights if on_disk else (), files=files)
    return Step(0, "load", state, state)


def run(
    first: Step,
    passes: Sequence[Pass],
    provider: Provider,
    begin: Callable[[int, Pass], None] = lambda _index, _pass: None,
    stop_after_rewrite: int | None = None,
    memory: Memory = NOTHING,
) -> Iterator[Step]:
    """Run `passes` over the graph of step 0; gives a Step after each. Raises what `run_pass` does.

    `stop_after_rewrite` ends all rewriting after that number, counted over the whole run.
    """
    ledger = Ledger(stop_after_rewrite)
    step = first
    for index, step_pass in enumerate(passes, start=1):
        begin(index, step_pass)
        step = run_pass(step.end, index, step_pass, provider, ledger, memory)
        yield step


def run_pass(
    start: State, index: int, step_pass: Pass, provider: Provider, ledger: Ledger, memory: Memory = NOTHING
) -> Step:
    """Run one pass, or find what it did in `memory`; `ledger` numbers its rewrites and says which to leave out.

    Raises LlmcError for bad input, PassError where the pass meets a graph that breaks ONNX's rules, and PassCrash
    for a bug of the pass.
    """
    started = time.perf_counter()
    step = Step(index, step_pass.key(), start, start, rewrites_before=ledger.taken, stop_after=ledger.stop_after)
    activations = provider(step_pass) if "activations" in step_pass.needs else None
    remembered = PassMemory(memory, start, step_pass, ledger, activations.digest if activations else "")
    outcome = remembered.find()
    if outcome is not None:
        step.result, step.skipped, step.end, step.cached = outcome.result, outcome.skipped, outcome.after, True
    else:
        _run(step, step_pass, Context(ledger, activations, memory), memory)
        if activations:
            step.result.warnings += activations.warnings
            step.result.calibrated, step.result.spreads = activations.calibrated, activations.spreads
        remembered.keep(Outcome(step.result, step.skipped, step.end))
    step.seconds = time.perf_counter() - started
    return step


def _run(step: Step, step_pass: Pass, context: Context, memory: Memory) -> None:
    ledger, since = context.ledger, step.start.since_inference
    graph = step.start.take()
    inferences = graph.inferences
    ledger.inferred = None if since is None else (graph, ledger.taken - since)
    try:
        with collector_paused():
            step.result = step_pass.run(graph, context)
    except Skip as skip:
        step.skipped = str(skip)
    except (LlmcError, PassError, DamagedError):
        raise
    except Exception as error:
        raise PassCrash(step, error) from error
    if step.result.rewrites or graph.inferences != inferences:
        structure = to_structure(graph)
        if step.result.rewrites:
            try:
                _check(structure, step.key)
            except PassError as error:
                raise PassCrash(step, error) from error
        if not step.start.still(graph, structure):
            step.end = memory.state(structure)
    else:
        step.start.put_back(graph)
    step.end.since_inference = None if ledger.inferred is None else ledger.taken - ledger.inferred[1]


def check_graph(graph: Graph, key: str) -> None:
    """Raises PassError where `graph` is not valid ONNX; the message names the step `key` that left it so."""
    _check(to_structure(graph), key)


def _check(structure: Structure, key: str) -> None:
    try:
        check_without(structure.model, structure.weights)
    except onnx.checker.ValidationError as error:
        raise PassError(f"{key} left an invalid graph: {error}") from error
