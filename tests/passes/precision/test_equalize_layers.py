from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, PassResult, Skip
from llmc.passes.graph import Array, Constant, Graph, digest, infer_shapes, to_model
from llmc.passes.precision.equalize_layers import EqualizeLayers


def with_weights(graph: Graph, seed: int = 0, spread: float = 2.0) -> Graph:
    """Inputs in upper case become constants; the channels of W and B differ by `spread`, in powers of e."""
    rng = np.random.default_rng(seed)
    for tensor in list(graph.inputs):
        if tensor.name.isupper():
            values = rng.standard_normal(tensor.shape)
            for axis in range(min(2, values.ndim)):
                channels = np.exp(spread * rng.standard_normal(values.shape[axis]))
                values = values * np.expand_dims(channels, [i for i in range(values.ndim) if i != axis])
            tensor.to_constant(values.astype(np.float32))
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    return graph


def run(graph: Graph, stop_after: int | None = None, **parameters) -> PassResult:
    return EqualizeLayers(**parameters).run(graph, Context(Ledger(stop_after)))


def outputs(graph: Graph, feeds: dict[str, Array]) -> Array:
    return np.concatenate([value.reshape(-1) for value in Session(graph).run(feeds).values()])


# graph text, pairs
FIRES = {
    "matmul": ("(float[3,8] x, float[8,6] W, float[6,4] V) => (float[3,4] y) { m = MatMul(x, W) y = MatMul(m, V) }", 1),
    "matmul with bias, leaky": (
        "(float[3,8] x, float[8,6] W, float[6] B, float[6,4] V) => (float[3,4] y)"
        "{ m = MatMul(x, W) a = Add(B, m) r = LeakyRelu <alpha=0.3> (a) y = MatMul(r, V) }",
        1,
    ),
    "gemm, transposed": (
        "(float[3,8] x, float[6,8] W, float[6] B, float[4,6] V) => (float[3,4] y)"
        "{ g = Gemm <transB=1, alpha=0.5, beta=2.0> (x, W, B) r = Relu(g) y = Gemm <transB=1> (r, V) }",
        1,
    ),
    "conv, depthwise, conv": (
        "(float[1,2,8,8] x, float[6,2,3,3] W, float[6] B, float[6,1,3,3] D, float[6] C, float[4,6,1,1] V)"
        "=> (float[1,4,8,8] y) { c = Conv <pads=[1,1,1,1]> (x, W, B) r = Relu(c)"
        "d = Conv <group=6, pads=[1,1,1,1]> (r, D, C) q = Relu(d) y = Conv(q, V) }",
        2,
    ),
    "conv in groups, PRelu, added bias": (
        "(float[1,4,8] x, float[6,4,3] W, float[6,1] B, float[6,1] S, float[8,3,3] V) => (float[1,8,4] y)"
        "{ c = Conv(x, W) a = Add(c, B) r = PRelu(a, S) y = Conv <group=2> (r, V) }",
        1,
    ),
}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 3))
@pytest.mark.parametrize("case", FIRES)
def test_equalisation_is_exact_in_float32_and_ends(case, parse, random_feeds, seed, spread):
    text, pairs = FIRES[case]
    graph = with_weights(parse(text), seed, spread)
    feeds, before = random_feeds(graph), Counter(node.op for node in graph.nodes)
    exact = outputs(graph, feeds)

    result = run(graph)

    assert len(result.rewrites) == pairs, result.near_misses
    assert Counter(node.op for node in graph.nodes) == before
    onnx.checker.check_model(to_model(graph), full_check=True)
    # the bound of the class's Safety
    assert np.abs(outputs(graph, feeds) - exact).max() <= 1e-5 * np.abs(exact).max()
    assert run(graph).rewrites == [], "even channels are left as they are"


def test_both_weights_get_the_same_ranges(parse):
    graph = with_weights(parse(FIRES["matmul"][0]))
    run(graph)
    first, second = (np.abs(node.inputs[1].values) for node in graph.nodes)
    # two roundings of float32
    np.testing.assert_allclose(first.max(axis=0), second.max(axis=1), rtol=1e-6)


TWO = "(float[3,6] x, float[6,6] W, float[6,6] V"
LEAVES_ALONE = {
    "a graph output": (TWO + ") => (float[3,6] m, float[3,6] y) { m = MatMul(x, W) y = MatMul(m, V) }", "an output"),
    "a second consumer": (
        TWO + ") => (float[3,6] z) { m = MatMul(x, W) y = MatMul(m, V) z = Add(m, y) }",
        "'m' has another consumer",
    ),
    "no homogeneous function": (
        TWO + ") => (float[3,6] y) { m = MatMul(x, W) g = Gelu(m) y = MatMul(g, V) }",
        "made by Gelu, which no scale goes through",
    ),
    "two terms": (
        TWO + ", float[3,6] r) => (float[3,6] y) { m = MatMul(x, W) a = Add(m, r) y = MatMul(a, V) }",
        "has two terms that are not constant",
    ),
    "a bias that is computed": (
        TWO + ", float[6] b) => (float[3,6] y) { m = Gemm(x, W, b) y = MatMul(m, V) }",
        "the bias of 'm' is not constant",
    ),
    "excluded": (TWO + ") => (float[3,6] y) { m = MatMul(x, W) y = MatMul(m, V) }", "excluded by 'first'"),
}


@pytest.mark.parametrize("case", LEAVES_ALONE)
def test_it_says_why_a_layer_is_left_alone(case, parse):
    text, reason = LEAVES_ALONE[case]
    graph = with_weights(parse(text))
    for node in graph.nodes:
        node.name = node.outputs[0].name
    infer_shapes(graph)
    before = digest(graph)
    result = run(graph, exclude=["first"] if case == "excluded" else [])
    assert result.rewrites == []
    assert digest(graph) == before
    assert any(reason in miss.reason for miss in result.near_misses), result.near_misses


def test_a_refused_rewrite_leaves_the_graph_as_it_is(parse):
    graph = with_weights(parse(FIRES["matmul"][0]))
    infer_shapes(graph)
    before = digest(graph)
    assert run(graph, stop_after=0).rewrites == []
    assert digest(graph) == before


def test_a_graph_without_weights_is_skipped(parse):
    with pytest.raises(Skip, match="no Conv, MatMul or Gemm has a constant weight"):
        run(parse("(float[3] x) => (float[3] y) { y = Relu(x) }"))
