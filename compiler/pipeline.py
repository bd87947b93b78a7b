"""Runs the passes of a recipe, in its order: one Step each, which verification, progress and report listen to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import onnx

from llmc.compiler.report.statistics import count_operators
from llmc.passes.base import Activations, Context, Ledger, Pass, PassError, PassResult, Skip
from llmc.passes.graph import Graph, Structure, to_structure

Provider = Callable[[Pass], Activations | None]
"""Gives a pass that needs activations what it needs."""


@dataclass
class Step:
    """One pass that has run: the graph before it (weights shared, not copied) and after it."""

    index: int
    key: str
    operators_before: dict[str, int]
    before: Structure
    graph: Graph
    result: PassResult = field(default_factory=PassResult)
    skipped: str = ""
    seconds: float = 0.0


def run(
    graph: Graph,
    passes: Sequence[Pass],
    provider: Provider,
    begin: Callable[[int, Pass], None] = lambda _index, _pass: None,
    stop_after_rewrite: int | None = None,
) -> Iterator[Step]:
    """Run `passes` over `graph`, in place; gives a Step after each.

    `stop_after_rewrite` ends all rewriting after that number, counted over the whole run. Raises LlmcError for
    bad input and PassError where a pass leaves a graph that ONNX's checker refuses.
    """
    ledger = Ledger(stop_after_rewrite)
    for index, step_pass in enumerate(passes, start=1):
        begin(index, step_pass)
        started = time.perf_counter()
        step = Step(index, step_pass.key(), count_operators(graph), to_structure(graph), graph)
        activations = provider(step_pass) if "activations" in step_pass.needs else None
        try:
            step.result = step_pass.run(graph, Context(ledger, activations))
        except Skip as skip:
            step.skipped = str(skip)
        if step.result.rewrites:
            check_graph(graph, step.key)
        step.seconds = time.perf_counter() - started
        yield step


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
