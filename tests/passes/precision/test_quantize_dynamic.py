from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, LlmcError, PassResult, Skip
from llmc.passes.graph import Array, Constant, Graph, to_model
from llmc.passes.precision.quantize_dynamic import QuantizeDynamic

RNG = np.random.default_rng(0)


def with_weights(graph: Graph, **given: Array) -> Graph:
    """Inputs in upper case become constants."""
    for tensor in list(graph.inputs):
        if tensor.name.isupper():
            values = RNG.standard_normal(tensor.shape).astype(tensor.dtype)
            tensor.to_constant(given.get(tensor.name, values))
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    return graph


def run(graph: Graph, stop_after: int | None = None, **parameters) -> PassResult:
    return QuantizeDynamic(**parameters).run(graph, Context(Ledger(stop_after)))


def operators(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


ONE = ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"]
FIRES = {
    "matmul": ("(float[B,S,6] x, float[6,5] W) => (float[B,S,5] y) { y = MatMul(x, W) }", ONE),
    "matmul of a matrix": ("(float[S,6] x, float[6,5] W) => (float[S,5] y) { y = MatMul(x, W) }", ONE),
    "gemm": (
        "(float[S,6] x, float[6,5] W, float[5] C) => (float[S,5] y) { y = Gemm <alpha=0.5, beta=2.0> (x, W, C) }",
        [*ONE, "Add"],
    ),
    "gemm, transposed, a bias that is computed": (
        "(float[S,6] x, float[5,6] W, float[5] c) => (float[S,5] y) { y = Gemm <transB=1, beta=2.0> (x, W, c) }",
        [*ONE, "Mul", "Add"],
    ),
    "gemm without bias": ("(float[S,6] x, float[6,5] W) => (float[S,5] y) { y = Gemm <alpha=2.0> (x, W) }", ONE),
    "two products of one activation": (
        "(float[S,6] x, float[6,5] W, float[6,4] V) => (float[S,5] y, float[S,4] z)"
        "{ y = MatMul(x, W) z = MatMul(x, V) }",
        [*ONE, *ONE[1:]],
    ),
}


@pytest.mark.parametrize("case", FIRES)
def test_it_multiplies_in_integers(case, parse, random_feeds):
    text, made = FIRES[case]
    graph = with_weights(parse(text))
    feeds = random_feeds(graph, size=7)
    exact = Session(graph).run(feeds)
    result = run(graph)
    assert operators(graph) == Counter(made)
    onnx.checker.check_model(to_model(graph), full_check=True)
    assert set(result.asked) == {rewrite.node for rewrite in result.rewrites}
    assert all(dtype == "int8" for dtype in result.asked.values())
    for name, value in Session(graph).run(feeds).items():
        # Half a step of each factor, 1/510 and 1/254 of its range, over the six terms of a product.
        assert np.abs(value - exact[name]).max() < 0.04 * np.abs(exact[name]).max()


def test_it_computes_what_numpy_does(parse):
    graph = with_weights(parse(FIRES["matmul of a matrix"][0]))
    (weight,) = (t.values for t in graph.tensors().values() if isinstance(t, Constant))
    x = RNG.standard_normal((9, 6)).astype(np.float32)
    run(graph)
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    levels = np.clip(np.rint(x / step) + zero, 0, 255)
    steps = np.abs(weight).max(axis=0) / 127
    steps = np.where(steps.astype(np.float16) < steps, np.nextafter(steps.astype(np.float16), np.float16(9)), steps.astype(np.float16)).astype(np.float32)  # fmt: skip # noqa: E501
    expected = (levels - zero) @ np.rint(weight / steps) * (step * steps)
    # float32 rounds the step: a value that lies between two levels may go to the other one, in one of 54 places
    off = np.abs(Session(graph).run({"x": x})["y"] - expected)
    assert np.median(off) < 1e-5
    assert off.max() < step * np.abs(weight).max() * 1.1


LEFT = {
    "float16": (
        "(float16[S,6] x, float16[6,5] W) => (float16[S,5] y) { y = MatMul(x, W) }",
        {},
        "DynamicQuantizeLinear takes float32 only",
    ),
    "two activations": (
        "(float[S,6] x, float[6,5] v) => (float[S,5] y) { y = MatMul(x, v) }",
        {},
        "it multiplies two activations, or a weight that is computed: fold-constants makes those constants",
    ),
    "many matrices": (
        "(float[2,S,6] x, float[2,6,5] W) => (float[2,S,5] y) { y = MatMul(x, W) }",
        {},
        "its weight is more than one matrix",
    ),
    "a weight on the left": (
        "(float[6,S] x, float[5,6] W) => (float[5,S] y) { y = MatMul(W, x) }",
        {},
        "its weight stands on the left, or its activation is transposed",
    ),
    "excluded": (
        "(float[S,6] x, float[6,5] W) => (float[S,5] y) { y = MatMul(x, W) }",
        {"exclude": ["last"]},
        "excluded by 'last'",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_it_says_why_a_product_is_left_alone(case, parse):
    text, parameters, reason = LEFT[case]
    graph = with_weights(parse(text))
    before = operators(graph)
    result = run(graph, **parameters)
    assert result.kept == {"y": reason}
    assert not result.rewrites
    assert operators(graph) == before


def test_a_graph_without_products_is_skipped(parse):
    with pytest.raises(Skip, match="the graph has no MatMul or Gemm"):
        run(parse("(float[3] x) => (float[3] y) { y = Relu(x) }"))


def test_a_run_ends_after_the_rewrite_that_it_is_told(parse):
    graph = with_weights(parse(FIRES["two products of one activation"][0]))
    assert len(run(graph, stop_after=1).rewrites) == 1
    assert operators(graph)["MatMul"] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_an_error(bad, parse):
    weight = np.full((6, 5), bad, np.float32)
    with pytest.raises(LlmcError, match="weight 'W' of y has NaN or infinity"):
        run(with_weights(parse(FIRES["matmul"][0]), W=weight))
