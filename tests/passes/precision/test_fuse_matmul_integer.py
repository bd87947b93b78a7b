from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from llmc.compiler.report.statistics import layer_precision
from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, PassResult
from llmc.passes.decompose.decompose_quantized import DecomposeQuantized
from llmc.passes.graph import Array, Constant, Graph, copy_graph, load_values, to_model
from llmc.passes.precision.fuse_matmul_integer import FuseMatmulInteger

RNG = np.random.default_rng(0)
SCALES = {"s": np.float32(0.02), "t": RNG.uniform(0.005, 0.02, 5).astype(np.float32), "z": np.int8(0)}


def prepared(parse, text: str, **given: Array) -> Graph:
    """The inputs but x become constants: scales, zero points, int8 weights, float biases."""
    graph = parse(text)
    for tensor in list(graph.inputs):
        if tensor.name in given or tensor.name != "x":
            tensor.to_constant(np.asarray(given.get(tensor.name, _values(tensor.name, tensor.shape, tensor.dtype))))
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    return graph


def _values(name: str, shape: list[int], dtype: np.dtype) -> Array:
    if name in SCALES:
        return np.asarray(SCALES[name], dtype).reshape(shape)
    if name.startswith("z"):
        return np.zeros(shape, dtype)
    if np.dtype(dtype).kind in "iu":
        return RNG.integers(-127, 128, shape).astype(dtype)
    return RNG.standard_normal(shape).astype(dtype)


def run(graph: Graph, stop_after: int | None = None) -> PassResult:
    return FuseMatmulInteger().run(graph, Context(Ledger(stop_after)))


def operators(graph: Graph) -> dict[str, int]:
    return dict(Counter(node.op for node in graph.nodes))


X = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
W = "w = DequantizeLinear <axis=1> (W, t, zw) "
HEAD = "(float[B,3,6] x, float s, int8 z, int8[6,5] W, float[5] t, int8[5] zw, float[5] b) => (float[B,3,5] y) {"
FLAT = HEAD.replace("[B,3,", "[B,")
FUSED = {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
FIRES = {
    "matmul and its bias": (HEAD + X + W + "p = MatMul(d, w) y = Add(p, b) }", FUSED),
    "the bias first": (HEAD + X + W + "p = MatMul(d, w) y = Add(b, p) }", FUSED),
    "no bias": (HEAD + X + W + "y = MatMul(d, w) }", FUSED),
    "gemm": (FLAT + X + W + "y = Gemm(d, w, b) }", FUSED),
    "gemm, the weight's rows first": (
        FLAT.replace("W, float", "V, int8[5,6] W, float") + X + "w = DequantizeLinear <axis=0> (W, t, zw)"
        "y = Gemm <transB=1> (d, w, b) }",
        FUSED,
    ),
    "one scale for the weight": (
        HEAD + X + "w = DequantizeLinear (W, s, z) y = MatMul(d, w) }",
        FUSED,
    ),
    "unsigned activations": (HEAD.replace("int8 z,", "uint8 z,") + X + W + "y = MatMul(d, w) }", FUSED),
    "another reader of the product": (
        HEAD.replace("y) {", "y, float[B,3,5] p) {") + X + W + "p = MatMul(d, w) y = Add(p, b) }",
        {**FUSED, "Add": 1},
    ),
    "a reader of the dequantized activation": (
        HEAD.replace("y) {", "y, float[B,3,6] e) {") + X + W + "y = MatMul(d, w) e = Relu(d) }",
        {"QuantizeLinear": 2, "DequantizeLinear": 1, "MatMulIntegerToFloat": 1, "Relu": 1},
    ),
    "two products of one activation": (
        HEAD.replace("y) {", "y, float[B,3,5] v) {") + X + W + "y = MatMul(d, w) p = MatMul(d, w) v = Add(p, b) }",
        {"QuantizeLinear": 1, "MatMulIntegerToFloat": 2},
    ),
}


@pytest.mark.parametrize("case", FIRES)
def test_it_computes_the_same(case, parse, random_feeds):
    text, left = FIRES[case]
    graph = prepared(parse, text)
    reference, feeds = copy_graph(graph), random_feeds(graph)
    assert len(run(graph).rewrites) == left["MatMulIntegerToFloat"]
    assert operators(graph) == left
    expected, found = Session(reference).run(feeds), Session(graph).run(feeds)
    for name, value in expected.items():
        # Exact sums of six terms against float32's, which rounds each by 2^-24, and so the products of scales
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6 * max(np.abs(value).max(), 1.0))


def test_levels_beyond_the_range_saturate_as_before(parse):
    graph = prepared(parse, FIRES["no bias"][0])
    x = np.linspace(-9, 9, 2 * 3 * 6, dtype=np.float32).reshape(2, 3, 6)
    expected = Session(graph).run({"x": x})["y"]
    run(graph)
    np.testing.assert_allclose(Session(graph).run({"x": x})["y"], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_it_computes_what_numpy_does(parse):
    graph = prepared(parse, FIRES["matmul and its bias"][0])
    held = {t.name: load_values(t) for t in graph.tensors().values() if isinstance(t, Constant)}
    x = RNG.standard_normal((2, 3, 6)).astype(np.float32)
    run(graph)
    levels = np.clip(np.rint(x / held["s"]), -128, 127)
    expected = levels @ held["W"].astype(np.float64) * (held["s"].astype(np.float64) * held["t"]) + held["b"]
    # the scales' product, its product with the sum, and the bias: three roundings of 2^-24
    np.testing.assert_allclose(Session(graph).run({"x": x})["y"], expected, rtol=0, atol=3e-7 * np.abs(expected).max())


def test_zero_points_of_weights_are_kept(parse, random_feeds):
    zeros = np.array([0, 3, -7, 0, 120], np.int8)
    graph = prepared(parse, FIRES["no bias"][0], zw=zeros)
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)["y"]
    assert len(run(graph).rewrites) == 1
    np.testing.assert_allclose(Session(graph).run(feeds)["y"], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_decompose_quantized_takes_it_apart_again(parse, random_feeds):
    graph = prepared(parse, FIRES["matmul and its bias"][0])
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)["y"]
    run(graph)
    DecomposeQuantized().run(graph, Context())
    assert "MatMulIntegerToFloat" not in operators(graph)
    np.testing.assert_allclose(Session(graph).run(feeds)["y"], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_it_is_int8_in_the_report_and_keeps_its_name(parse):
    graph = prepared(parse, FIRES["no bias"][0].replace("y = MatMul", "[product] y = MatMul"))
    run(graph)
    onnx.checker.check_model(to_model(graph))
    assert [(o.domain, o.version) for o in to_model(graph).opset_import] == [("", 20), ("com.microsoft", 1)]
    (layer,) = layer_precision(graph, {"product": "int8"}, {})
    assert (layer.node, layer.asked, layer.found) == ("product", "int8", "int8")


def test_a_run_ends_after_the_rewrite_that_it_is_told(parse):
    graph = prepared(parse, FIRES["two products of one activation"][0])
    assert len(run(graph, stop_after=1).rewrites) == 1
    assert operators(graph)["MatMul"] == 1


LEFT = {
    "levels that nothing quantizes": (
        HEAD.replace("float[B,3,6] x", "int8[B,3,6] x") + "d = DequantizeLinear(x, s, z)" + W + "y = MatMul(d, w) }",
        "nothing quantizes its first factor right before it",
    ),
    "two activations": (
        "(float[6,6] x, float s, int8 z) => (float[6,6] y) {" + X + "y = MatMul(d, d) }",
        "its second factor is not one constant matrix",
    ),
    "another scale": (
        HEAD + X.replace("(q, s, z)", "(q, s2, z)") + W + "y = MatMul(d, w) }",
        "its scales are computed, in blocks, or not those that its activation was quantized by",
    ),
    "scales along the sums": (
        HEAD.replace("float[5] t", "float[5] t, float[6] s2") + X + "w = DequantizeLinear <axis=0> (W, s2, z6)"
        "y = MatMul(d, w) }",
        "the scales of its weight do not run along its output channels",
    ),
    "alpha": (FLAT + X + W + "y = Gemm <alpha=2.0> (d, w, b) }", "it transposes or scales a term"),
    "a bias for each row": (
        "(float[3,6] x, float s, int8 z, int8[6,5] W, float[5] t, int8[5] zw, float[3,5] b) => (float[3,5] y) {"
        + X + W + "y = Gemm(d, w, b) }",
        "its bias is not one number for each output channel",
    ),
    "four bits": (
        HEAD.replace("int8", "int4") + X + W + "y = MatMul(d, w) }",
        "it multiplies int4 with int4; the kernel takes 8-bit integers",
    ),
    "half precision": (
        HEAD.replace("float", "float16") + X + W + "y = MatMul(d, w) }",
        "its result is float16; the kernel makes float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_it_leaves_alone(case, parse):
    text, reason = LEFT[case]
    text = text.replace("float[5] t,", "float[5] t, float s2,") if case == "another scale" else text
    text = text.replace("float[5] t,", "float[5] t, int8[6] z6,") if "z6" in text else text
    graph = prepared(parse, text) if "int4" not in text else _four_bits(parse, text)
    before = operators(graph)
    assert [miss.reason for miss in run(graph).near_misses] == [reason]
    assert operators(graph) == before


def _four_bits(parse, text: str) -> Graph:
    graph = parse(text, opset=21)
    for tensor in list(graph.inputs)[1:]:
        tensor.to_constant(np.ones(tensor.shape, tensor.dtype))
    graph.inputs = graph.inputs[:1]
    return graph


def test_products_in_float_are_not_mentioned(parse):
    result = run(prepared(parse, "(float[B,6] x, float[6,5] W) => (float[B,5] y) { y = MatMul(x, W) }"))
    assert not result.rewrites
    assert not result.near_misses
