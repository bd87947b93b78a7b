from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.graph import (
    Array,
    Graph,
    constants,
    load_values,
)
from llmc.passes.precision.half import FLOAT16

ROUNDING = 2.0**-11
"""Relative error of one rounding to float16."""

# What stays in float32

KEEPS: dict[str, tuple[str, float, str, str, set[str]]] = {
    "a square that overflows": (
        "(float[N,4] x) => (float[N,4] y) <float two = {2}>"
        "{ a = Abs(x) p = Pow(a, two) m = ReduceMean<keepdims=1>(p) q = Sqrt(m) y = Div(a, q) }",
        300.0,
        "p",
        "'p' reaches",
        {"Abs", "Div"},
    ),
    "a constant that is too large": (
        "(float[N,4] x) => (float[N,4] y) <float c = {1e6}, float d = {1e-3}>"
        "{ a = Abs(x) b = Mul(a, d) e = Mul(b, c) y = Neg(e) }",
        1.0,
        "e",
        "its constant 'c' reaches 1e+06, float16 ends at 65504",
        {"Abs", "Neg", "Mul"},
    ),
    "values that float16 would flush to zero": (
        "(float[N,4] x) => (float[N,4] y) <float d = {1e-3}, float u = {1e4}>"
        "{ a = Abs(x) b = Mul(a, d) e = Mul(b, b) f = Mul(e, u) y = Neg(f) }",
        1.0,
        "e",
        "'e' stays under",
        {"Abs", "Neg", "Mul"},
    ),
    "an epsilon that float16 has not": (
        "(float[N,4] x) => (float[N,4] y) <float e = {1e-12}> { a = Abs(x) b = Add(a, e) y = Neg(b) }",
        1.0,
        "b",
        "its constant 'e' is 1e-12, too small for float16",
        {"Abs", "Neg"},
    ),
    "a lower bound that float16 has not": (
        "(float[N,4] x) => (float[N,4] y) <float e = {1e-9}> { a = Abs(x) b = Clip(a, e) y = Neg(b) }",
        1.0,
        "b",
        "its constant 'e' is 1e-09, too small for float16",
        {"Abs", "Neg"},
    ),
    "a square inside an operator": (
        "(float[N,4] x) => (float[N,1] y) { a = Abs(x) b = ReduceL2<keepdims=1>(a) y = Neg(b) }",
        300.0,
        "b",
        "it squares 'a'",
        {"Abs", "Neg"},
    ),
    "a running sum": (
        "(float[N,4] x) => (float[N,4] y) <int64 one = {1}> { a = Abs(x) b = CumSum(a, one) y = Neg(b) }",
        1.0,
        "b",
        "it counts along a whole axis",
        {"Abs", "Neg"},
    ),
    "an operator without a float16 form": (
        "(float[N,4] x) => (float[N,4] y) <float o = {0}, float e = {4}, float s = {1}>"
        "{ r = Range(o, e, s) a = Abs(x) y = Mul(a, r) }",
        1.0,
        "r",
        "Range-11 has no float16 form",
        {"Abs", "Mul"},
    ),
    "an operator that names its type": (
        "(float[4,4] x) => (float[4,4] y) { e = EyeLike<dtype=1>(x) a = Abs(x) y = MatMul(a, e) }",
        1.0,
        "e",
        "its type is an attribute of it",
        {"Abs", "MatMul"},
    ),
    "scales too fine for float16": (
        "(float[N,2] x) => (float[N,2] y) <int8[2,2] w = {1, 2, 3, 4}, float[2] s = {0.5, 3e-7}, int8[2] z = {0, 0}>"
        "{ d = DequantizeLinear<axis=1>(w, s, z) y = MatMul(x, d) }",
        1.0,
        "d",
        "its scale 's' goes down to 3e-07, too coarse in float16",
        {"MatMul"},
    ),
}


@pytest.mark.parametrize("name", KEEPS)
def test_keeps_in_float32_what_float16_cannot_hold(
    name: str, parse: Any, random_feeds: Any, convert: Any, close: Any, half_operators: Any
) -> None:
    text, scale, kept, reason, operators = KEEPS[name]
    graph = parse(text, opset=21)
    feeds = {"x": random_feeds(graph)["x"] * np.float32(scale)}
    expected = Session(graph).run(feeds)
    result = convert(graph, feeds)
    assert reason in result.kept[kept]
    assert half_operators(graph) == operators
    close(graph, feeds, expected, roundings=4)


def test_a_layer_norm_spelled_out_keeps_only_its_squares(
    parse: Any, random_feeds: Any, convert: Any, close: Any
) -> None:
    graph = parse(
        "(float[N,4] x) => (float[N,4] y) <int64[1] axis = {-1}, float two = {2}, float e = {1e-12}>"
        "{ m = ReduceMean(x, axis) d = Sub(x, m) p = Pow(d, two) v = ReduceMean(p, axis) a = Add(v, e) s = Sqrt(a)"
        " q = Div(d, s) y = Neg(q) }"
    )
    feeds = {"x": random_feeds(graph)["x"] * 500}
    expected = Session(graph).run(feeds)
    result = convert(graph, feeds)
    assert set(result.kept) == {"p", "v", "a", "s"}
    assert set(result.asked) == {"m", "d", "q", "y"}
    close(graph, feeds, expected, roundings=6)


def test_the_margin_decides(parse: Any, convert: Any) -> None:
    text = "(float[N,4] x) => (float[N,4] y) { a = Abs(x) y = Neg(a) }"
    feeds = {"x": np.full((1, 4), 20_000, np.float32)}
    assert convert(parse(text), feeds, margin=3.0).kept == {}
    kept = convert(parse(text), feeds, margin=4.0).kept
    assert kept["a"] == "'x' reaches 2e+04 on the data, over 16376 = 65504 / margin"


def test_what_is_not_finite_stays(parse: Any, convert: Any) -> None:
    graph = parse("(float[N,1] x) => (float[N,1] y) { a = Log(x) y = Neg(a) }")
    result = convert(graph, {"x": np.zeros((1, 1), np.float32)})
    assert result.kept["a"] == "'a' is not finite on the data"


# Masks

FILL = FLOAT16.fill
SCORES = "float[N,4,4] s, float[N,1,4] m"
MASKS = {
    "added, by product": ("{ i = Sub(one, m) f = Mul(i, c) a = Add(s, f) y = Softmax(a) }", -3.4e38, FILL),
    "added, chosen": ("{ b = Cast<to=9>(m) f = Where(b, zero, c) a = Add(s, f) y = Softmax(a) }", -3.4e38, FILL),
    "chosen": ("{ b = Cast<to=9>(m) a = Where(b, s, c) y = Softmax(a) }", -1e9, FILL),
    "added twice": ("{ i = Sub(one, m) f = Mul(i, c) a = Add(s, f) b = Add(a, f) y = Softmax(b) }", -1e30, FILL),
    "minus infinity": ("{ b = Cast<to=9>(m) f = Where(b, zero, c) a = Add(s, f) y = Softmax(a) }", -np.inf, -np.inf),
    "moved on its way": (
        "{ i = Sub(one, m) f = Mul(i, c) u = Unsqueeze(f, ax) g = Squeeze(u, ax) a = Add(g, s) y = Softmax(a) }",
        -3.4e38,
        FILL,
    ),
    "that fits": ("{ i = Sub(one, m) f = Mul(i, c) a = Add(s, f) y = Softmax(a) }", -10000.0, -10000.0),
}


def masked(parse: Any, body: str, fill: float, outputs: str = "float[N,4,4] y") -> tuple[Graph, dict[str, Array]]:
    graph = parse(
        f"({SCORES}) => ({outputs}) <float one = {{1}}, float zero = {{0}}, float c = {{0}}, int64[1] ax = {{0}}>{body}"
    )
    for constant in constants(graph):
        if constant.name == "c":
            constant.values = np.array(fill, np.float32)
    scores = np.random.default_rng(0).standard_normal((2, 4, 4)).astype(np.float32) * 30
    return graph, {"s": scores, "m": np.float32([[[1, 1, 0, 0]], [[0, 1, 1, 1]]])}


@pytest.mark.parametrize("name", MASKS)
def test_masks_become_float16_without_overflow(name: str, parse: Any, convert: Any, close: Any) -> None:
    body, fill, becomes = MASKS[name]
    graph, feeds = masked(parse, body, fill)
    expected = Session(graph).run(feeds)
    result = convert(graph, feeds)
    assert result.kept == {}
    assert {float(load_values(c)) for c in constants(graph) if c.name == "c"} == {becomes}
    assert [r.detail for r in result.rewrites if r.detail] == (
        [f"{fill:.4g} in 'c' becomes {FILL:.0f}"] * body.count("c)") if becomes == FILL else []
    )
    # Scores reach 100, where float16 is 2^-4 apart: probabilities are off by half of that at most, relatively.
    close(graph, feeds, expected, roundings=64)


def test_a_row_that_is_masked_throughout_stays_finite(parse: Any, convert: Any) -> None:
    graph, feeds = masked(parse, MASKS["added twice"][0], -3.4e38)
    feeds["m"] = np.zeros((2, 1, 4), np.float32)
    feeds["s"] = -np.abs(feeds["s"])
    convert(graph, feeds)
    probabilities = Session(graph).run(feeds)["y"]
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=4 * ROUNDING)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("{ i = Sub(one, m) f = Mul(i, c) a = Add(s, f) y = Softmax(a) }", "float[N,4,4] y, float[N,4,4] a"),
        ("{ i = Sub(one, m) f = Mul(i, c) a = Add(s, f) z = Neg(f) y = Softmax(a) }", "float[N,4,4] y, float[N,1,4] z"),
    ],
    ids=["an output of the graph", "something else"],
)
def test_a_mask_that_goes_elsewhere_stays_in_float32(
    body: str, outputs: str, parse: Any, convert: Any, close: Any
) -> None:
    graph, feeds = masked(parse, body, -1e30, outputs)
    expected = Session(graph).run(feeds)
    result = convert(graph, feeds)
    assert "f" in result.kept
    close(graph, feeds, expected, roundings=64)


def test_a_mask_that_is_kept_keeps_its_softmax(parse: Any, convert: Any) -> None:
    """Were float32's -3.4e38 cast to float16 it would be minus infinity, and a masked row NaN."""
    graph, feeds = masked(parse, MASKS["added, by product"][0], -3.4e38)
    feeds["m"] = np.zeros((2, 1, 4), np.float32)
    result = convert(graph, feeds, keep=["Add"])
    assert result.kept["y"] == "'a' holds float32 numbers that stand for minus infinity"
    assert np.isfinite(Session(graph).run(feeds)["y"]).all()


# Angles and indices


def test_angles_stay_exact(parse: Any, convert: Any, close: Any) -> None:
    graph = parse(
        "(int64[N,1] p, float[N,4] x) => (float[N,4] y) <float[1,4] f = {1, 0.5, 0.25, 0.125}>"
        "{ q = Cast<to=1>(p) a = MatMul(q, f) t = Transpose(a) u = Transpose(t) c = Cos(u) s = Sin(u)"
        " d = Mul(x, c) e = Mul(x, s) y = Add(d, e) }"
    )
    feeds = {"p": np.array([[4001], [31999]]), "x": np.ones((2, 4), np.float32)}
    expected = Session(graph).run(feeds)
    result = convert(graph, feeds)
    assert set(result.kept) == {"q", "a", "c", "s"}
    assert set(result.asked) == {"d", "e", "y"}
    close(graph, feeds, expected, roundings=4)


def test_a_sine_between_weights_keeps_itself_only(parse: Any, random_feeds: Any, convert: Any) -> None:
    graph = parse(
        "(float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 2}>"
        "{ h = MatMul(x, w) a = Add(h, b) s = Sin(a) y = MatMul(s, w) }"
    )
    result = convert(graph, random_feeds(graph))
    assert set(result.kept) == {"a", "s"}


def test_indices_stay_exact(parse: Any, convert: Any) -> None:
    graph = parse(
        "(int64[N] i, float[M,2] x) => (float[N,2] y) <float c = {0.5}>"
        "{ f = Cast<to=1>(i) h = Mul(f, c) g = Floor(h) j = Cast<to=7>(g) r = Gather(x, j) y = Neg(r) }"
    )
    x = np.arange(8000, dtype=np.float32).reshape(4000, 2) / 8
    feeds = {"i": np.array([7001, 4099, 5]), "x": x}
    result = convert(graph, feeds)
    assert {"h", "g"} <= set(result.kept)
    np.testing.assert_allclose(Session(graph).run(feeds)["y"], -x[feeds["i"] // 2], rtol=ROUNDING)


# Subgraphs

BRANCHES = (
    "(bool q, float[N,4] x) => (float[N,4] y) { a = Abs(x) b = Neg(a) c = If(q) <"
    "then_branch = t () => (float[N,4] z) { d = Exp(b) z = Add(d, a) },"
    "else_branch = e () => (float[N,4] z2) { z2 = Identity(b) }> y = Tanh(c) }"
)


@pytest.mark.parametrize("choice", [True, False])
def test_subgraphs_stay_in_float32_behind_casts(
    choice: bool, parse: Any, random_feeds: Any, convert: Any, close: Any
) -> None:
    graph = parse(BRANCHES)
    feeds = {**random_feeds(graph), "q": np.array(choice)}
    expected = Session(graph).run(feeds)
    result = convert(graph, feeds)
    assert set(result.asked) == {"a", "b", "y"}
    assert result.kept["d"] == "it is inside a subgraph"
    close(graph, feeds, expected, roundings=6)


@pytest.mark.parametrize("stop_after", range(13))
def test_stops_after_any_rewrite_with_a_valid_graph(stop_after: int, parse: Any, convert: Any, close: Any) -> None:
    graph, feeds = masked(parse, MASKS["moved on its way"][0], -3.4e38)
    expected = Session(graph).run(feeds)
    result = convert(graph, feeds, stop_after=stop_after)
    assert len(result.rewrites) == min(stop_after, 6)
    close(graph, feeds, expected, roundings=64)
