"""convert-bf16: what it converts and leaves, against bfloat16 as ml_dtypes rounds it."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.graph import constants, copy_graph, load_values, onnx_dtype
from llmc.passes.precision.convert_bf16 import ConvertBf16
from llmc.passes.precision.half import BFLOAT16

ROUNDING = 2.0**-8
"""Largest relative error of one rounding to bfloat16: half a step of 2^-7."""
IN = "(float[N,4] x) => (float[N,4] y)"

FIRES: dict[str, tuple[str, int, set[str]]] = {
    "products and sums": (
        f"{IN} <float[4,4] w = {{1,2,-1,1, 0,1,1,-2, 3,1,0,1, -1,1,2,1}}> {{ h = MatMul(x, w) y = Add(h, x) }}",
        2,
        {"MatMul", "Add"},
    ),
    "what overflows in float16": (f"{IN} <float c = {{1e6}}> {{ a = Mul(x, c) y = Div(a, c) }}", 2, {"Mul", "Div"}),
    "what is too small for float16": (f"{IN} <float c = {{1e-12}}> {{ a = Abs(x) y = Add(a, c) }}", 2, {"Abs", "Add"}),
    "a softmax": (f"{IN} {{ a = Tanh(x) y = Softmax(a) }}", 2, {"Tanh", "Softmax"}),
    "one Cast for all readers": (f"{IN} {{ a = Exp(x) b = Tanh(x) y = Add(a, b) }}", 2, {"Exp", "Tanh", "Add"}),
}

LEAVES_ALONE: dict[str, tuple[str, str]] = {
    "no form": (f'{IN} {{ y = Einsum <equation = "ij->ij"> (x) }}', "Einsum-12 has no bfloat16 form"),
    "angles": (
        f"{IN} <float c = {{100}}> {{ a = Mul(x, c) y = Sin(a) }}",
        "needs its angle exactly, bfloat16 holds angles above 256 to whole numbers at best",
    ),
    "counting": (
        f"{IN} <int64 axis = {{1}}> {{ y = CumSum(x, axis) }}",
        "it counts along a whole axis, bfloat16 stops counting at 256",
    ),
    "integers": (
        f"{IN} <float c = {{100}}> {{ a = Mul(x, c) i = Cast<to=7>(a) y = Cast<to=1>(i) }}",
        "makes it an integer, bfloat16 holds numbers above 256 to whole numbers at best",
    ),
}


def operators(graph: Any) -> set[str]:
    found = {n.op for n in graph.nodes if any(onnx_dtype(t) == BFLOAT16.dtype for t in (*n.inputs, *n.outputs))}
    return found - {"Cast"}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any, random_feeds: Any, convert: Any) -> None:
    text, casts, expected = FIRES[name]
    graph = parse(text)
    feeds = random_feeds(graph)
    truth = Session(graph).run(feeds)["y"]
    result = convert(graph, feeds, kind=ConvertBf16)
    assert operators(graph) == expected
    assert sum(node.op == "Cast" for node in graph.nodes) == casts
    assert set(result.asked.values()) == {"bfloat16"}
    # input, weight, and the result of each of at most three nodes are rounded; sums of four terms may cancel to a
    # quarter of their largest
    bound = 4 * 5 * ROUNDING * max(float(np.abs(truth).max()), 1.0)
    np.testing.assert_allclose(Session(graph).run(feeds)["y"], truth, rtol=0, atol=bound)


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any, random_feeds: Any, convert: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = parse(text, opset=22)
    result = convert(graph, random_feeds(graph), kind=ConvertBf16)
    assert operators(graph) == set()
    assert any(reason in said for said in result.kept.values()), result.kept


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 5), width=st.integers(1, 48), seed=st.integers(0, 99), scale=st.floats(1e-30, 1e30))
def test_a_product_rounds_as_bfloat16_does(rows: int, width: int, seed: int, scale: float, parse: Any) -> None:
    """To the bit where sums are exact, else to one rounding: float32 adds in an order of its own."""
    graph = parse(f"(float[N,{width}] x, float[{width},3] w) => (float[N,3] y) {{ y = MatMul(x, w) }}")
    rng = np.random.default_rng(seed)
    feeds = {
        "x": (rng.standard_normal((rows, width)) * scale).astype(np.float32),
        "w": rng.standard_normal((width, 3)).astype(np.float32),
    }
    ConvertBf16().run(graph, Context())
    halves = [feeds[name].astype(ml_dtypes.bfloat16).astype(np.float64) for name in ("x", "w")]
    exact = halves[0] @ halves[1]
    bound = (ROUNDING + width * 2.0**-23) * np.abs(halves[0]) @ np.abs(halves[1])
    assert (np.abs(Session(graph).run(feeds)["y"] - exact) <= bound).all()


def test_the_opset_rises_to_where_conv_has_a_form(parse: Any, random_feeds: Any, convert: Any) -> None:
    text = "(float[N,2,8,8] x, float[3,2,3,3] w) => (float[N,3,6,6] y) { c = Conv(x, w) y = Relu(c) }"
    graph = parse(text, opset=17)
    feeds = random_feeds(graph)
    truth = Session(copy_graph(graph)).run(feeds)["y"]
    convert(graph, feeds, kind=ConvertBf16)
    assert graph.opset == 22
    assert operators(graph) == {"Conv", "Relu"}
    # both factors and the sum of 18 products are rounded
    bound = 3 * ROUNDING * 18 * float(np.abs(feeds["x"]).max() * np.abs(feeds["w"]).max())
    np.testing.assert_allclose(Session(graph).run(feeds)["y"], truth, rtol=0, atol=bound)


def test_the_opset_stays_where_it_has_all_forms(parse: Any, random_feeds: Any, convert: Any) -> None:
    graph = parse(f"{IN} {{ y = Relu(x) }}", opset=17)
    convert(graph, random_feeds(graph), kind=ConvertBf16)
    assert graph.opset == 17


def test_weights_are_cast_once(parse: Any, random_feeds: Any, convert: Any) -> None:
    weight = ", ".join(map(str, range(16)))
    graph = parse(f"{IN} <float[4,4] w = {{{weight}}}> {{ a = MatMul(x, w) y = MatMul(a, w) }}")
    convert(graph, random_feeds(graph), kind=ConvertBf16)
    (weight,) = constants(graph)
    assert load_values(weight).dtype == ml_dtypes.bfloat16


def test_what_stands_for_minus_infinity_stays_finite(parse: Any, convert: Any) -> None:
    """float32's lowest number is beyond bfloat16: rounded, it would be minus infinity, and its row NaN."""
    lowest = float(np.finfo(np.float32).min)
    graph = parse(
        f"(float[N,4] s, bool[N,4] m) => (float[N,4] y) <float z = {{0}}, float c = {{{lowest!r}}}> "
        "{ f = Where(m, z, c) a = Add(s, f) y = Softmax(a) }"
    )
    feeds = {"s": np.ones((2, 4), np.float32), "m": np.array([[True, True, False, False], [False] * 4])}
    result = convert(graph, feeds, kind=ConvertBf16)
    assert any("-3.403e+38 in 'c' becomes -8.4738e+37" in rewrite.detail for rewrite in result.rewrites)
    np.testing.assert_array_equal(Session(graph).run(feeds)["y"], [[0.5, 0.5, 0, 0], [0.25] * 4])


def test_inputs_and_outputs_convert_where_asked(parse: Any, random_feeds: Any, convert: Any) -> None:
    graph = parse(f"{IN} {{ y = Relu(x) }}")
    feeds = random_feeds(graph)
    convert(graph, feeds, kind=ConvertBf16, inputs_outputs="convert")
    expected = np.maximum(feeds["x"], 0).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(Session(graph).run(feeds)["y"], expected)
    assert [onnx_dtype(tensor) for tensor in (*graph.inputs, *graph.outputs)] == [onnx.TensorProto.BFLOAT16] * 2
    assert not [node for node in graph.nodes if node.op == "Cast"]
