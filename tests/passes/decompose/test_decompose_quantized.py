"""What becomes of a graph; the numbers of each operator are compared in the files beside it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.decompose.decompose_quantized import DecomposeQuantized
from llmc.passes.graph import from_model, to_model

GRIDS = "<float s = {0.5}, float t = {0.25}, uint8 u = {128}, int8 z = {0}>"
HEAD = f"(float[N,4] x, int8[4,3] w) => (float[N,3] y) {GRIDS}"
FIRES = {
    "QLinearMatMul": (
        f"{HEAD} {{ q = QuantizeLinear(x, s, u) p = QLinearMatMul(q, s, u, w, t, z, s, u)"
        " y = DequantizeLinear(p, s, u) }",
        ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "QuantizeLinear", "DequantizeLinear"],
    ),
    "MatMulInteger, its sums small enough": (
        f"(uint8[N,4] x, int8[4,3] w) => (int32[N,3] y) {GRIDS} {{ y = MatMulInteger(x, w, u, z) }}",
        ["DequantizeLinear", "DequantizeLinear", "MatMul", "Cast"],
    ),
    "MatMulInteger that is scaled afterwards": (
        f"(uint8[N,900] x, int8[900,3] w) => (float[N,3] y) {GRIDS} {{"
        " p = MatMulInteger(x, w, u, z) f = Cast<to=1>(p) y = Mul(f, s) }",
        ["DequantizeLinear", "DequantizeLinear", "MatMul", "Cast", "Mul"],
    ),
}
LEAVES_ALONE = {
    "sums beyond what float32 holds": (
        f"(uint8[N,900] x, int8[900,3] w) => (int32[N,3] y) {GRIDS} {{ y = MatMulInteger(x, w, u, z) }}",
        "float32 is exact to 16777216",
    ),
    "how many it adds is not known": (
        f"(uint8[N,K] x, int8[K,3] w) => (int32[N,3] y) {GRIDS} {{ y = MatMulInteger(x, w, u, z) }}",
        "how many products it adds is not known",
    ),
    "one of two readers wants integers": (
        f"(uint8[N,900] x, int8[900,3] w) => (float[N,3] y, int32[N,3] v) {GRIDS} {{"
        " p = MatMulInteger(x, w, u, z) y = Cast<to=1>(p) v = Neg(p) }",
        "they are used as integers",
    ),
    "nothing quantized": ("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", ""),
}


def feeds_for(graph: Any, random_feeds: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        name: value if value.dtype.kind == "f" else rng.integers(-100, 100, value.shape).astype(value.dtype)
        for name, value in random_feeds(graph).items()
    }


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any, random_feeds: Any) -> None:
    text, expected = FIRES[name]
    graph = parse(text, opset=21)
    feeds = feeds_for(graph, random_feeds)
    before = Session(graph).run(feeds)["y"]
    DecomposeQuantized().run(graph, Context())
    assert [node.op for node in graph.nodes] == expected
    after = Session(graph).run(feeds)["y"]
    # A level of the output of QLinearMatMul is 0.5; the sums of 900 products are rounded to 24 bits.
    level = 0.5 if name == "QLinearMatMul" else 2.0**-22 * np.abs(before).max() * ("afterwards" in name)
    assert np.abs(after.astype(np.float64) - before).max() <= level


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = parse(text, opset=21)
    before = to_model(graph)
    result = DecomposeQuantized().run(graph, Context())
    assert result.rewrites == []
    assert to_model(graph).graph.node == before.graph.node
    assert [reason in miss.reason for miss in result.near_misses] == [True] * bool(reason)


@pytest.mark.parametrize("stop_after", range(4))
def test_stops_after_any_rewrite_with_the_same_results(stop_after: int, parse: Any, random_feeds: Any) -> None:
    graph = parse(DYNAMIC)
    feeds = feeds_for(graph, random_feeds)
    before = Session(graph).run(feeds)["y"]
    result = DecomposeQuantized().run(graph, Context(Ledger(stop_after)))
    assert len(result.rewrites) == min(stop_after, 2)
    after = Session(graph).run(feeds)["y"]
    assert np.allclose(after, before, rtol=0, atol=2e-5 * np.abs(before).max())


DYNAMIC = (
    "(float[N,768] x, int8[768,2] w) => (float[N,2] y) <float s = {0.02}, int8 z = {0}> {"
    " q, a, b = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, b, z) f = Cast<to=1>(i) t = Mul(a, s)"
    " y = Mul(f, t) }"
)


def test_dynamic_quantization_before_a_product_needs_no_integers(parse: Any) -> None:
    """What onnxruntime's quantize_dynamic writes: the levels reach the product as floating-point numbers."""
    graph = parse(DYNAMIC)
    result = DecomposeQuantized().run(graph, Context())
    assert [r.rule for r in result.rewrites] == ["DynamicQuantizeLinear", "MatMulInteger"]
    (product,) = (node for node in graph.nodes if node.op == "MatMul")
    assert product.inputs[0].inputs[0].op == "Sub"
    assert [t.inputs[0].op for t in product.inputs[0].inputs[0].inputs] == ["Clip", "Round"]


def test_gives_what_the_node_tests_of_onnx_expect() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        quantized = ("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul")
        cases = [c for c in collect_testcases(None) if any(n.op_type in quantized for n in c.model.graph.node)]
    assert len(cases) >= 15
    for case in cases:
        graph = from_model(case.model)
        rewrites = DecomposeQuantized().run(graph, Context()).rewrites
        assert len(rewrites) == 1, case.name
        onnx.checker.check_model(to_model(graph), full_check=True)
        for inputs, outputs in case.data_sets:
            feeds = {i.name: np.asarray(value) for i, value in zip(case.model.graph.input, inputs, strict=True)}
            found = Session(graph).run(feeds)
            for info, expected in zip(case.model.graph.output, outputs, strict=True):
                assert np.array_equal(found[info.name], expected), case.name
