"""Profiles against the inputs of a graph."""

from __future__ import annotations

from typing import Any, cast

import pytest

from llmc.compiler.targets import Range
from llmc.compiler.targets.input_shapes import input_shapes, profile_problems
from llmc.passes.graph import Graph

TWO = "(float[batch,sequence] x, float[batch,4] z, float[4] w) => (float[batch,sequence] y) { y = Relu(x) }"
SIZES = {"batch": Range(1, 2, 8), "sequence": Range(0, 16, 64)}


@pytest.fixture(scope="module")
def graph(parse: Any) -> Graph:
    return cast(Graph, parse(TWO))


def test_every_dynamic_input_gets_its_shapes(graph: Graph) -> None:
    assert not list(profile_problems(graph, [SIZES]))
    assert input_shapes(graph, SIZES) == {
        "x": ([1, 0], [2, 16], [8, 64]),
        "z": ([1, 4], [2, 4], [8, 4]),
    }


def test_a_sum_has_the_sizes_of_its_parts(parse: Any) -> None:
    mask = parse("(float[batch,sequence] x, float[batch,4] z) => (float[batch,sequence] y) { y = Relu(x) }")
    mask.inputs[1].shape = ["batch", "past + sequence"]
    sizes = {**SIZES, "past": Range(0, 32, 100)}
    assert not list(profile_problems(mask, [sizes]))
    assert input_shapes(mask, sizes)["z"] == ([1, 0], [2, 48], [8, 164])
    assert list(profile_problems(mask, [SIZES])) == ["profile: has no sizes for 'past' (input 'z', axis 1)"]


def test_a_static_graph_needs_no_profile(parse: Any) -> None:
    graph = parse("(float[2,4] x) => (float[2,4] y) { y = Relu(x) }")
    assert not list(profile_problems(graph, []))
    assert not list(profile_problems(graph, [{}]))
    assert input_shapes(graph, {}) == {}


@pytest.mark.parametrize(
    ("profiles", "problem"),
    [
        ([], "no profile: the inputs have dynamic dimensions (batch, sequence), which need min, opt and max sizes"),
        ([{"batch": Range(1, 2, 8)}], "profile: has no sizes for 'sequence' (input 'x', axis 1)"),
        ([SIZES, {"sequence": Range(1, 2, 8)}], "profile 2: has no sizes for 'batch' (input 'x', axis 0)"),
        (
            [{**SIZES, "sequense": Range(1, 1, 1)}],
            "profile: no input has a dimension 'sequense'; did you mean 'sequence'?",
        ),
        ([{**SIZES, "batch": Range(4, 2, 8)}], "profile: 'batch' is 4, 2, 8, which is not 0 ≤ min ≤ opt ≤ max"),
        ([{**SIZES, "batch": Range(1, 9, 8)}], "profile: 'batch' is 1, 9, 8, which is not 0 ≤ min ≤ opt ≤ max"),
        ([{**SIZES, "batch": Range(-1, 2, 8)}], "profile: 'batch' is -1, 2, 8, which is not 0 ≤ min ≤ opt ≤ max"),
        ([{**SIZES, "batch": Range(0, 0, 0)}], "profile: 'batch' is 0, 0, 0, which is not 0 ≤ min ≤ opt ≤ max"),
    ],
)
def test_names_what_is_wrong_with_a_profile(graph: Graph, profiles: list[dict[str, Range]], problem: str) -> None:
    assert list(profile_problems(graph, profiles)) == [problem]


def test_dimensions_that_no_profile_can_size(parse: Any) -> None:
    graph = parse("(float[?,4] x, float[4] z) => (float[?,4] y) { y = Relu(x) }")
    graph.inputs[1].shape = None
    assert list(profile_problems(graph, [])) == [
        "input 'x', axis 0: is dynamic without a name, so that no profile can size it",
        "input 'z' has no known rank: give its shape in the model",
    ]
