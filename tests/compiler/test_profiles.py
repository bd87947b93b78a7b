from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Loaded
from llmc.compiler.profiles import (
    LARGEST_WORK,
    affordable,
    check_sizes,
    declare_inputs,
    generated_sizes,
    resolve_profiles,
    sizes_of,
    verified_sizes,
)
from llmc.compiler.recipe import Recipe
from llmc.compiler.targets import Range
from llmc.passes.graph import Derived, Graph, constants

MODEL = "(float[batch,time,4] x) => (float[batch,time,4] y) { y = Relu(x) }"


def recipe(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(f"passes: []\n{text}", encoding="utf-8")
    return Recipe.load(path)


def loaded(graph: Graph, **limits: int) -> Loaded:
    return Loaded(graph, "onnx", "m.onnx", "0", limits=limits)


def test_the_recipe_gives_sizes(tmp_path: Path, parse: Any) -> None:
    chosen = recipe(tmp_path, "model: {dimensions: {batch: [1, 2, 4], time: 16}}")
    profiles, notes = resolve_profiles(loaded(parse(MODEL)), chosen)
    assert profiles == [{"batch": Range(1, 2, 4), "time": Range(16, 16, 16)}]
    assert notes == []


def test_sizes_begin_where_the_model_does(tmp_path: Path, parse: Any) -> None:
    """What wav2vec2 hears is 400 samples at least."""
    sound = Loaded(parse(MODEL), "huggingface", "m", "0", least={"time": 400})
    profiles, _ = resolve_profiles(sound, recipe(tmp_path, ""))
    assert profiles == [{"batch": Range(1, 1, 8), "time": Range(400, 16000, 160000)}]
    with pytest.raises(LlmcError, match="'time' begins at 1, the model takes at least 400"):
        resolve_profiles(sound, recipe(tmp_path, "model: {dimensions: {time: [1, 500, 600]}}"))


def test_profiles_that_come_out_the_same_are_one(tmp_path: Path, parse: Any) -> None:
    chosen = recipe(
        tmp_path,
        "model: {dimensions: {batch: 1, time: 16}}\n"
        "target: {kind: tensorrt, profiles: [{elsewhere: 1}, {elsewhere: [1, 8, 16]}]}",
    )
    half = Loaded(parse(MODEL), "huggingface", "m", "0", elsewhere=frozenset({"elsewhere"}))
    profiles, _ = resolve_profiles(half, chosen)
    assert profiles == [{"batch": Range(1, 1, 1), "time": Range(16, 16, 16)}]


def test_what_it_does_not_give_is_assumed_and_said(tmp_path: Path, parse: Any) -> None:
    profiles, notes = resolve_profiles(loaded(parse(MODEL), time=64), recipe(tmp_path, ""))
    assert profiles == [{"batch": Range(1, 1, 8), "time": Range(1, 64, 64)}]
    assert len(notes) == 2
    assert notes[1] == "the recipe gives no sizes for 'time': built for 1 to 64, best at 64"


@pytest.mark.parametrize(
    ("text", "limits", "message"),
    [
        ("model: {dimensions: {batsh: 2}}", {}, "the model has no dimension 'batsh'; did you mean 'batch'?"),
        (
            "model: {dimensions: {time: [1, 8, 600]}}",
            {"time": 512},
            "'time' goes up to 600, the model allows at most 512",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_model(
    text: str, limits: dict[str, int], message: str, tmp_path: Path, parse: Any
) -> None:
    with pytest.raises(LlmcError) as caught:
        resolve_profiles(loaded(parse(MODEL), **limits), recipe(tmp_path, text))
    assert message in str(caught.value)
    assert "r.yaml:2" in str(caught.value)


def test_inputs_can_be_declared(tmp_path: Path, parse: Any) -> None:
    graph = parse("(float[N,?,4] x) => (float[N,M,4] y) { y = Relu(x) }")
    declare_inputs(graph, recipe(tmp_path, "model: {inputs: {x: [N, time, 4]}, dimensions: {N: 1, time: 2}}"))
    assert graph.inputs[0].shape == ["N", "time", 4]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("{y: [2]}", "the model has no input 'y'; known: x"),
        ("{x: [2]}", "has 3 dimensions ['batch', 'time', 4], the recipe gives 1"),
        ("{x: [2, 3, 5]}", "dimension 2 of input 'x' is fixed at 4"),
    ],
)
def test_declarations_that_do_not_fit(inputs: str, message: str, tmp_path: Path, parse: Any) -> None:
    with pytest.raises(LlmcError) as caught:
        declare_inputs(parse(MODEL), recipe(tmp_path, f"model: {{inputs: {inputs}}}"))
    assert message in str(caught.value)


def test_samples_outside_the_profile(parse: Any) -> None:
    graph = parse(MODEL)
    profile = {"batch": Range(1, 1, 2), "time": Range(1, 4, 8)}
    fits, does_not = {"x": np.zeros((2, 8, 4))}, {"x": np.zeros((1, 9, 4))}
    check_sizes(graph, [fits], [profile], "data")
    with pytest.raises(LlmcError, match="data, sample 2: 'time' is 9, the profile goes from 1 to 8"):
        check_sizes(graph, [fits, does_not], [profile], "data")
    check_sizes(graph, [does_not], [profile, {**profile, "time": Range(9, 9, 9)}], "data")


def test_inputs_must_agree_about_a_size(parse: Any) -> None:
    graph = parse("(float[N] a, float[N] b) => (float[N] y) { y = Add(a, b) }")
    with pytest.raises(LlmcError, match="'N' is 2 in one input and 3 in 'b'"):
        sizes_of(graph, {"a": np.zeros(2), "b": np.zeros(3)})


SUMMED = """(int64[batch,new] ids, int64[batch,past] mask, float[batch,past] cache) => (float[batch,past] y)
    { y = Relu(cache) }"""


def summed(parse: Any) -> Graph:
    """A decoder's inputs: the mask covers what is cached and what is new."""
    graph: Graph = parse(SUMMED)
    graph.inputs[1].shape = ["batch", "past + new"]
    return graph


def test_a_sum_of_dimensions_is_sized_by_its_parts(tmp_path: Path, parse: Any) -> None:
    profiles, notes = resolve_profiles(
        loaded(summed(parse), **{"past + new": 64}), recipe(tmp_path, "model: {dimensions: {batch: 1}}")
    )
    assert profiles == [{"batch": Range(1, 1, 1), "new": Range(1, 32, 64), "past": Range(0, 32, 64)}]
    assert len(notes) == 2


def test_a_sum_that_the_model_does_not_allow(tmp_path: Path, parse: Any) -> None:
    with pytest.raises(LlmcError, match=r"past \+ new is 80 at best, the model allows at most 64"):
        resolve_profiles(
            loaded(summed(parse), **{"past + new": 64}),
            recipe(tmp_path, "model: {dimensions: {past: [0, 64, 64], new: [1, 16, 64]}}"),
        )


def test_sums_must_agree_with_their_parts(parse: Any) -> None:
    sample = {"ids": np.zeros((2, 3)), "mask": np.zeros((2, 8)), "cache": np.zeros((2, 5))}
    assert sizes_of(summed(parse), sample) == {"batch": 2, "new": 3, "past": 5}
    with pytest.raises(LlmcError, match=r"'past \+ new' is 8 in other inputs and 7 in 'mask'"):
        sizes_of(summed(parse), {**sample, "mask": np.zeros((2, 7))})


def test_generated_sizes_are_the_optimum_and_the_least() -> None:
    assert generated_sizes({"n": Range(1, 4, 8)}) == [{"n": 4}, {"n": 1}]


def test_generated_samples_are_at_the_edges_of_every_profile() -> None:
    profiles = [
        {"batch": Range(1, 1, 8), "sequence": Range(2, 128, 512)},
        {"batch": Range(4, 4, 4), "sequence": Range(64, 64, 128)},
    ]
    found = [(sizes["batch"], sizes["sequence"]) for sizes in verified_sizes(profiles, 12)]
    # 8 · 512 is 32 times 1 · 128, so the largest sizes of the first profile come one at a time
    assert found[:7] == [(1, 128), (1, 2), (8, 2), (1, 512), (4, 64), (4, 128), found[6]]
    assert len(found) == 12
    for number, sizes in enumerate(found[6:], 6):
        profile = profiles[number % 2]
        assert all(profile[n].min <= s <= profile[n].opt for n, s in zip(("batch", "sequence"), sizes, strict=True))
    assert [tuple(s.values()) for s in verified_sizes(profiles, 2)] == found[:2]


def test_generated_samples_of_a_large_model_are_cut_to_what_the_profile_allows(parse: Any) -> None:
    """By the largest of the inputs: what a past and a present have in common counts once."""
    text = """(int64[batch,new] ids, int64[batch,both] mask, float[batch,2,past,4] keys) => (float[batch,2,past,4] y)
        <float w = {2}> { y = Mul(keys, w) }"""
    graph = parse(text)
    graph.inputs[1].shape[1] = "past + new"
    profiles = [{"batch": Range(1, 1, 8), "new": Range(2, 128, 512), "past": Range(0, 128, 512)}]
    small = [{"batch": 1, "new": 128, "past": 128}]
    assert affordable(graph, profiles, small) == small
    constant = next(iter(constants(graph)))
    constant.values = Derived(1, (LARGEST_WORK // 20,), lambda: np.zeros(0, np.float32))
    assert affordable(graph, profiles, small) == [{"batch": 1, "new": 8, "past": 8}]
    assert affordable(graph, profiles, [{"batch": 8, "new": 2, "past": 0}]) == [{"batch": 8, "new": 2, "past": 0}]
    constant.values = Derived(1, (LARGEST_WORK,), lambda: np.zeros(0, np.float32))
    assert affordable(graph, profiles, small) == [{"batch": 1, "new": 2, "past": 1}], "no less than the profile has"
