"""Local verification against full: it finds every planted fault that full finds, at the same pass, for half of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler import pipeline
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.data import generate
from llmc.compiler.recipe import Recipe
from llmc.compiler.recipe.sections import Budgets, VerifySection
from llmc.compiler.session import Session
from llmc.compiler.verification import Verifier
from llmc.compiler.verification.judge import Judge
from llmc.compiler.verification.local import LocalVerifier
from llmc.passes.base import Ledger
from llmc.passes.graph import copy_graph, load_model

from .conftest import ALLOWED, FAULTS

BAR = 0.5
"""The part of a forward pass that local verification of one pass may cost, for each sample."""


def first_breach(case: Any, mode: str) -> tuple[int, str] | None:
    """The first pass that breaks the budget, as a compile in this mode sees it."""
    made = case.plan
    section = VerifySection(mode=mode, budgets=Budgets(relative_l2=ALLOWED * case.sound_error))
    verifier = Verifier(Session(copy_graph(made.loaded.graph)).run_each, made.verification)
    judge, ledger = Judge(section, verifier, len(made.recipe.passes)), Ledger()
    step = pipeline.loaded(copy_graph(made.loaded.graph))
    for index, step_pass in enumerate(made.recipe.passes, start=1):
        step = pipeline.run_pass(
            step.end, index, step_pass, lambda p: SampledActivations(made.calibration[p.key()]), ledger
        )
        verdict = judge.judge(step, step_pass.safety)
        if verdict.problems:
            return index, step.key
        judge.accept(step, verdict)
    return None


def check(case: Any) -> None:
    found = first_breach(case, "full")
    assert found is not None
    assert first_breach(case, "local") == found


@pytest.mark.parametrize("fault", ["no-mask", "bad-scale"])
def test_local_finds_what_full_finds(fault: str, planted: Callable[..., Any]) -> None:
    check(planted("bert", fault, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("model", "fault"), [(model, fault) for model, faults in FAULTS.items() for fault in faults])
def test_local_finds_all_that_full_finds(model: str, fault: str, seed: int, planted: Callable[..., Any]) -> None:
    check(planted(model, fault, seed=seed, size="base"))


@pytest.fixture
def one_core() -> Iterator[None]:
    """Threads that wait spin: on one core the time of the process is the time of the work."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """Of the processor, at best."""
    spent = []
    for _ in range(times):
        started = time.process_time()
        work()
        spent.append(time.process_time() - started)
    return min(spent)


@pytest.mark.slow
@pytest.mark.usefixtures("one_core")
def test_a_pass_over_bert_base_costs_half_of_a_forward_pass(exported: Callable[[str, str], Path]) -> None:
    """Every pass of optimize, at batch 1 and 128 tokens."""
    graph = load_model(exported("bert", "base"))
    samples = list(generate(graph, [{"batch": 1, "sequence": 128}], count=2))
    session = Session(copy_graph(graph))
    forward = seconds(lambda: session.run(samples[0]), 5)
    verifier, verified = LocalVerifier(samples), []
    for step in pipeline.run(pipeline.loaded(graph), Recipe.load("optimize").passes, lambda _: None):
        if not step.result.rewrites:
            continue
        before, after = step.before, step.end.structure  # read outside of the clock
        comparison = verifier.compare(before, after)  # captures, the first time: once a compile
        assert comparison is not None
        spent = seconds(lambda b=before, a=after: verifier.compare(b, a)) / len(verifier.values)  # type: ignore[misc]
        print(f"{step.key:20} {len(comparison.regions):4} regions  {spent / forward:6.1%} of a forward pass")
        verified.append((step.key, spent / forward))
        verifier.accept(after, comparison)
    assert len(verified) > 5
    assert [key for key, part in verified if part > BAR] == []
