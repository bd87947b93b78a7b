"""Channels divided by way of the constants before them: exact to float32's rounding, or refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.graph import Array, Constant, Graph, copy_graph, fresh_names, infer_shapes, outputs_of_scopes
from llmc.passes.precision.channel_scaling import Refusal, divide
from llmc.passes.precision.quantize_weights import QuantizeWeights

DIVISOR = np.exp(np.random.default_rng(7).standard_normal(8)).astype(np.float32)


def prepared(parse, body: str, **weights: tuple[int, ...]) -> Graph:
    """`body` makes t float [B, S, 8] from x [B, S, 4] and constants; y = Relu(t)."""
    given = "".join(f", float[{','.join(map(str, shape))}] {name}" for name, shape in weights.items())
    graph = parse(f"(float[B,S,4] x{given}) => (float[B,S,8] y) {{ {body} y = Relu(t) }}", opset=24)
    for tensor in list(graph.inputs)[1:]:
        seed = sum(map(ord, tensor.name))
        tensor.to_constant(np.random.default_rng(seed).standard_normal(tensor.shape).astype(np.float32))
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    infer_shapes(graph)
    return graph


def divided(graph: Graph, **feeds: Array) -> tuple[Array, Array] | Refusal:
    """t before, and after its channels were divided."""
    reference, tensor = copy_graph(graph), graph.tensors()["t"]
    found = divide(tensor, DIVISOR, list(tensor.outputs), outputs_of_scopes(graph))
    if isinstance(found, Refusal):
        return found
    fresh, nodes = fresh_names(graph), len(graph.nodes)
    for division in found:
        division.apply(fresh)
    assert len(graph.nodes) == nodes
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)}
    before, after = (Session(g, ["t"]).run(feeds, ["t"])["t"] for g in (reference, graph))
    return before, after


THROUGH = {
    "a product": ("t = MatMul(x, w)", {"w": (4, 8)}),
    "a product and its bias": ("a = MatMul(x, w) t = Add(b, a)", {"w": (4, 8), "b": (8,)}),
    "a bias that is one number": ("a = MatMul(x, w) t = Sub(a, b)", {"w": (4, 8), "b": (1,)}),
    "layer normalisation": (
        "a = MatMul(x, w) t = LayerNormalization <axis=-1> (a, g, b)",
        {"w": (4, 8), "g": (8,), "b": (8,)},
    ),
    "root mean square normalisation": ("a = MatMul(x, w) t = RMSNormalization(a, g)", {"w": (4, 8), "g": (8,)}),
    "a gate": ("a = MatMul(x, w) b = MatMul(x, u) s = Sigmoid(a) t = Mul(s, b)", {"w": (4, 8), "u": (4, 8)}),
    "a factor": ("a = MatMul(x, w) s = Sigmoid(a) t = Mul(s, g)", {"w": (4, 8), "g": (8,)}),
    "a quotient": ("a = MatMul(x, w) s = Softplus(a) b = MatMul(x, u) t = Div(b, s)", {"w": (4, 8), "u": (4, 8)}),
    "a sum of two products": ("a = MatMul(x, w) b = MatMul(x, u) t = Add(a, b)", {"w": (4, 8), "u": (4, 8)}),
    "a part of merged products": ("a = MatMul(x, w) s, t = Split <axis=-1, num_outputs=2> (a)", {"w": (4, 16)}),
    "the values of attention": (
        "q = MatMul(x, w) v = MatMul(x, u) t = Attention <q_num_heads=2, kv_num_heads=2> (q, q, v)",
        {"w": (4, 8), "u": (4, 8)},
    ),
}


@pytest.mark.parametrize("way", THROUGH)
def test_it_divides_by_way_of(way, parse):
    body, weights = THROUGH[way]
    before, after = divided(prepared(parse, body, **weights))
    # Each value is rounded a few times more, by 2^-24 of terms whose sum may be smaller than they are.
    assert np.allclose(after, before / DIVISOR, rtol=1e-5, atol=1e-5 * np.abs(before).max())
    assert not np.allclose(after, before)


def test_it_divides_by_way_of_a_gemm(parse):
    for flag, shape in ((0, (4, 8)), (1, (8, 4))):
        graph = parse(
            f"(float[B,4] x, float[{shape[0]},{shape[1]}] w, float[8] b) => (float[B,8] y)"
            f"{{ t = Gemm <transB={flag}, alpha=0.5, beta=2.0> (x, w, b) y = Relu(t) }}"
        )
        for tensor in list(graph.inputs)[1:]:
            tensor.to_constant(np.random.default_rng(3).standard_normal(tensor.shape).astype(np.float32))
        graph.inputs = graph.inputs[:1]
        reference = copy_graph(graph)
        tensor = graph.tensors()["t"]
        for division in divide(tensor, DIVISOR, list(tensor.outputs), set()):
            division.apply(fresh_names(graph))
        feeds = {"x": np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)}
        before, after = (Session(g, ["t"]).run(feeds, ["t"])["t"] for g in (reference, graph))
        assert np.allclose(after, before / DIVISOR, rtol=1e-5, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("block", [16, "channel"])
def test_of_a_quantized_weight_the_scales_are_divided(block, parse):
    graph = parse("(float[B,32] x, float[32,8] w) => (float[B,8] y) { t = MatMul(x, w) y = Relu(t) }")
    graph.inputs[1].to_constant(np.random.default_rng(2).standard_normal((32, 8)).astype(np.float32))
    graph.inputs = graph.inputs[:1]
    QuantizeWeights(method="rtn", block=block).run(graph, Context())
    reference, tensor = copy_graph(graph), graph.tensors()["t"]
    for division in divide(tensor, DIVISOR, list(tensor.outputs), set()):
        division.apply(fresh_names(graph))
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)}
    before, after = (Session(g, ["t"]).run(feeds, ["t"])["t"] for g in (reference, graph))
    assert np.allclose(after, before / DIVISOR, rtol=1e-5, atol=1e-5 * np.abs(before).max())


REFUSED = {
    "another reader": (
        "a = MatMul(x, w) t = Add(a, b) s = Sigmoid(a)",
        {"w": (4, 8), "b": (8,)},
        "'a' goes to Sigmoid 's' too",
    ),
    "what is not linear": ("a = MatMul(x, w) t = Relu(a)", {"w": (4, 8)}, "made by Relu"),
    "a sum with itself": ("a = MatMul(x, w) t = Add(a, a)", {"w": (4, 8)}, "adds a tensor to itself"),
    "a square": ("a = MatMul(x, w) t = Mul(a, a)", {"w": (4, 8)}, "multiplies a tensor with itself"),
    "a denominator": ("a = MatMul(x, w) s = Sigmoid(a) t = Div(s, g)", {"w": (4, 8), "g": (8,)}, "made by Sigmoid"),
    "normalisation over two axes": (
        "a = MatMul(x, w) s = Constant <value_ints=[1,2,8]>() r = Reshape(a, s)t = LayerNormalization <axis=-2> (r, g)",
        {"w": (4, 8), "g": (2, 8)},
        "normalises more than the last axis",
    ),
    "heads that share their values": (
        "q = MatMul(x, w) v = MatMul(x, u) t = Attention <q_num_heads=2, kv_num_heads=1> (q, v, v)",
        {"w": (4, 8), "u": (4, 4)},
        "share their values",
    ),
    "a weight that is computed": ("u = Relu(w) t = MatMul(x, u)", {"w": (4, 8)}, "is not a constant of its own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses(case, parse):
    body, weights, reason = REFUSED[case]
    found = divided(prepared(parse, body, **weights))
    assert isinstance(found, Refusal)
    assert reason in found


def test_other_readers_of_a_constant_keep_it(parse):
    graph = prepared(parse, "a = MatMul(x, w) b = MatMul(x, w) s = Sigmoid(b) t = Mul(a, s)", w=(4, 8))
    before, after = divided(graph)
    assert np.allclose(after, before / DIVISOR, rtol=1e-5, atol=1e-5 * np.abs(before).max())


def test_an_output_of_the_graph_is_not_divided(parse):
    graph = prepared(parse, "t = MatMul(x, w)", w=(4, 8))
    tensor = graph.tensors()["y"]
    assert "is an output" in divide(tensor, DIVISOR, [], outputs_of_scopes(graph))
    assert "is no node's result" in divide(graph.inputs[0], DIVISOR[:4], graph.inputs[0].outputs, set())
