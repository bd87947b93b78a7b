"""Runs the passes of a recipe, in its order: one Step each, which verification, progress and report listen to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import onnx

from llmc.compiler.report.statistics import count_operators
from llmc.passes.base import Activations, Context, Ledger, LlmcError, Pass, PassError, PassResult, Skip
from llmc.passes.graph import Graph, Structure, to_structure

Provider = Callable[[Pass], Activations | None]
"""Gives a pass that needs activations what it needs."""


@dataclass
class Step:
    """One pass that has run: the graph before it (weights shared, not copied) and after it. Step 0 is the load."""

    index: int
    key: str
    operators_before: dict[str, int]
    before: Structure
    graph: Graph
    result: PassResult = field(default_factory=PassResult)
    skipped: str = ""
    seconds: float = 0.0
    rewrites_before: int = 0
    """Rewrites that the run had done when the pass began."""

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
        """The step as far as it came; its `graph` is in no certain state, its `before` is whole."""


def loaded(graph: Graph) -> Step:
    """Step 0: nothing has run yet. Raises PassError where the loader left an invalid graph."""
    check_graph(graph, "the loader")
    return Step(0, "load", {}, to_structure(graph), graph)


def run(
    graph: Graph,
    passes: Sequence[Pass],
    provider: Provider,
    begin: Callable[[int, Pass], None] = lambda _index, _pass: None,
    stop_after_rewrite: int | None = None,
) -> Iterator[Step]:
    """Run `passes` over `graph`, in place; gives a Step after each. Raises what `run_pass` does.

    `stop_after_rewrite` ends all rewriting after that number, counted over the whole run.
    """
    ledger = Ledger(stop_after_rewrite)
    for index, step_pass in enumerate(passes, start=1):
        begin(index, step_pass)
        yield run_pass(graph, index, step_pass, provider, ledger)


def run_pass(graph: Graph, index: int, step_pass: Pass, provider: Provider, ledger: Ledger) -> Step:
    """Run one pass over `graph`, in place; `ledger` numbers its rewrites and says which to leave out.

    Raises LlmcError for bad input, PassError where the pass meets a graph that breaks ONNX's rules, and PassCrash
    for a bug of the pass.
    """
    started = time.perf_counter()
    step = Step(index, step_pass.key(), count_operators(graph), to_structure(graph), graph)
    step.rewrites_before = ledger.taken
    activations = provider(step_pass) if "activations" in step_pass.needs else None
    _run(step, step_pass, Context(ledger, activations))
    step.seconds = time.perf_counter() - started
    return step


def _run(step: Step, step_pass: Pass, context: Context) -> None:
    try:
        step.result = step_pass.run(step.graph, context)
    except Skip as skip:
        step.skipped = str(skip)
    except (LlmcError, PassError):
        raise
    except Exception as error:
        raise PassCrash(step, error) from error
    if step.result.rewrites:
        try:
            check_graph(step.graph, step.key)
        except PassError as error:
            raise PassCrash(step, error) from error


def check_graph(graph: Graph, key: str) -> None:
    """Raises PassError where `graph` is not valid ONNX; the message names the step `key` that left it so.

    Large weights are declared as inputs for the check: it needs their types, not their values.
    """
    structure = to_structure(graph)
    proto = structure.model.graph
    inline = [tensor for tensor in proto.initializer if tensor.name not in structure.weights]
    for tensor in proto.initializer:
        if tensor.name in structure.weights:
            proto.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del proto.initializer[:]
    proto.initializer.extend(inline)
    try:
        onnx.checker.check_model(structure.model)
    except onnx.checker.ValidationError as error:
        raise PassError(f"{key} left an invalid graph: {error}") from error
