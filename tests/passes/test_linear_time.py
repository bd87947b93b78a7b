"""What the default pipeline does for one node does not depend on how many there are."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import onnx
import pytest

from llmc.compiler.recipe import Recipe
from llmc.passes.base import Context, Skip
from llmc.passes.graph import load_model, save_model

BENCH = Path(__file__).parents[1] / "bench" / "models.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_models", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calls_per_node(model: onnx.ModelProto, path: Path) -> float:
    """Functions that Python and what it calls in C enter, from file to file, for each node: no clock is as steady."""
    onnx.save(model, path)
    count = 0

    def counted(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    passes = Recipe.load("optimize").passes
    sys.setprofile(counted)
    try:
        graph, context = load_model(path), Context()
        for step in passes:
            with suppress(Skip):
                step.run(graph, context)
        save_model(graph, path)
    finally:
        sys.setprofile(None)
    return count / len(model.graph.node)


@pytest.mark.parametrize("kind", ["chain", "dag"])
@pytest.mark.parametrize("sizes", [(400, 4_000), pytest.param((1_000, 100_000), marks=pytest.mark.slow)])
def test_the_work_for_a_node_is_flat(kind: str, sizes: tuple[int, int], bench: ModuleType, tmp_path: Path) -> None:
    small, large = (calls_per_node(bench.Generated(kind, size).model(), tmp_path / "model.onnx") for size in sizes)
    # Each pass and rule makes some calls for a graph of any size, and pieces are drawn at random: a few hundredths.
    # One step that goes through all nodes for each of them would add thousands.
    assert large < 1.05 * small
