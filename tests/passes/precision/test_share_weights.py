from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler import compile as run_compile
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.session import Session
from llmc.compiler.targets.tensorrt_import import availability
from llmc.kernels.codebook_matmul.reference import weight
from llmc.passes.base import Context, Ledger, LlmcError, PassResult
from llmc.passes.graph import Array, Constant, Graph, Node, copy_graph, load_values, to_model
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.precision.rounding.codebooks import Layout, kmeans, share
from llmc.passes.precision.share_weights import ShareWeights

PLACES = {
    "matmul": "(float[B,3,32] x, float[32,12] w) => (float[B,3,12] y) { y = MatMul(x, w) }",
    "vector": "(float[32] x, float[32,12] w) => (float[12] y) { y = MatMul(x, w) }",
    "gemm": "(float[B,32] x, float[32,12] w) => (float[B,12] y) { y = Gemm(x, w) }",
    "gemm, transB, bias": (
        "(float[B,32] x, float[12,32] w, float[12] b) => (float[B,12] y) { y = Gemm <transB=1> (x, w, b) }"
    ),
    "half precision": "(float16[B,3,32] x, float16[32,12] w) => (float16[B,3,12] y) { y = MatMul(x, w) }",
    "used twice": (
        "(float[B,32] x, float[32,12] w) => (float[B,12] y) "
        "{ a = MatMul(x, w) r = Relu(x) b = MatMul(r, w) y = Add(a, b) }"
    ),
}
LEFT_ALONE = {
    "left factor": ("(float[B,12,3] x, float[32,12] w) => (float[B,32,3] y) { y = MatMul(w, x) }", "left factor"),
    "a weight for each": ("(float[2,3,12] x, float[2,12,5] w) => (float[2,3,5] y) { y = MatMul(x, w) }", "no matrix"),
    "alpha": ("(float[B,12] x, float[12,5] w) => (float[B,5] y) { y = Gemm <alpha = 0.5> (x, w) }", "alpha or beta"),
    "transA": ("(float[12,B] x, float[12,5] w) => (float[B,5] y) { y = Gemm <transA = 1> (x, w) }", "transposed"),
    "two activations": ("(float[B,3] x, float[3,5] v) => (float[B,5] y) { y = MatMul(x, v) }", "two activations"),
    "integers": ("(int32[B,12] x, int32[12,5] w) => (int32[B,5] y) { y = MatMul(x, w) }", "its weight is int32"),
}


def prepared(parse: Any, text: str, seed: int = 0) -> Graph:
    """The inputs w and b become constants."""
    graph = parse(text)
    for tensor in list(graph.inputs):
        if tensor.name in "wb":
            values = np.random.default_rng([seed, *tensor.shape]).standard_normal(tensor.shape) * 4
            tensor.to_constant(values.astype(tensor.dtype))
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    return graph


def run(graph: Graph, feeds: Any = None, stop_after: int | None = None, **parameters: Any) -> PassResult:
    activations = None if feeds is None else SampledActivations([feeds])
    result = ShareWeights(**parameters).run(graph, Context(Ledger(stop_after), activations))
    onnx.checker.check_model(to_model(graph), full_check=True)
    return result


def operators(graph: Graph) -> dict[str, int]:
    return dict(Counter(node.op for node in graph.nodes))


def products(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "CodebookMatMul"]


def looked_up(node: Node, depth: int) -> Array:
    packed, codebook = (load_values(tensor) for tensor in node.inputs[1:])
    return weight(packed, codebook, node.attrs["bits"], depth)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("place", PLACES)
def test_it_computes_the_product_with_the_values_that_are_shared(place, bits, parse, random_feeds):
    graph = prepared(parse, PLACES[place])
    before, feeds = copy_graph(graph), random_feeds(graph)
    result = run(graph, feeds, bits=bits, values=64)
    found = products(graph)
    assert set(result.asked.values()) == {f"int{bits} weights"}
    assert "MatMul" not in operators(graph)
    assert "Gemm" not in operators(graph)
    for node in before.nodes:  # the graph before, with the weights that the codebooks stand for
        if node.op in ("MatMul", "Gemm"):
            shared = looked_up(found[0], 32)
            node.inputs[1].values = shared if node.attrs.get("transB") else shared.T
    expected = Session(before).run(feeds)["y"].astype(np.float64)
    # The same 32 products in another order: 2^-24 each of sums up to some hundred; float16 rounds by 2^-11.
    bound = (2e-3 if graph.outputs[0].dtype == np.float16 else 1e-5) * np.abs(expected).max()
    np.testing.assert_allclose(Session(graph).run(feeds)["y"].astype(np.float64), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_it_leaves_alone_it_says(case, parse, random_feeds):
    text, reason = LEFT_ALONE[case]
    graph = prepared(parse, text)
    result = run(graph, random_feeds(graph))
    assert result.rewrites == []
    assert reason in result.kept["y"]
    assert products(graph) == []


@pytest.mark.parametrize(
    ("codebook", "values", "shape"),
    [
        ("tensor", 1, (1, 1)),
        ("rows", 32, (12, 1)),
        ("rows", 100, (3, 1)),
        ("rows", 9999, (1, 1)),
        ("block", 8, (12, 4)),
        ("block", 5, (12, 4)),
        ("block", 999, (12, 1)),
    ],
)
def test_what_has_a_codebook_of_its_own(codebook, values, shape, parse, random_feeds):
    graph = prepared(parse, PLACES["matmul"])
    run(graph, random_feeds(graph), bits=2, codebook=codebook, values=values)
    (node,) = products(graph)
    assert node.inputs[2].shape == (*shape, 4)


@pytest.mark.parametrize("codebook", ["tensor", "rows", "block"])
def test_a_weight_of_few_values_is_stored_without_loss(codebook, parse, random_feeds):
    graph = prepared(parse, PLACES["matmul"])
    few = np.random.default_rng(3).choice(np.float32([-2, 0.5, 1, 7]), (32, 12))
    graph.tensors()["w"].values = few
    run(graph, random_feeds(graph), bits=2, codebook=codebook, values=32)
    np.testing.assert_allclose(looked_up(products(graph)[0], 32), few.T, rtol=1e-6)  # a mean of equal numbers


def test_products_with_equal_weights_share_indices_and_codebooks(parse, random_feeds):
    graph = prepared(
        parse,
        """(float[B,32] x, float[32,12] w, float[12,32] v) => (float[B,12] y)
        { a = MatMul(x, w) r = Relu(x) b = Gemm <transB=1> (r, v) y = Add(a, b) }""",
    )
    graph.tensors()["v"].to_constant(np.ascontiguousarray(load_values(graph.tensors()["w"]).T))
    graph.inputs = graph.inputs[:1]
    assert len(run(graph, random_feeds(graph)).rewrites) == 2
    first, second = products(graph)
    assert [a is b for a, b in zip(first.inputs[1:], second.inputs[1:], strict=True)] == [True, True]


TIED = """(int64[B] i, float[40,16] table, float[16,40] head, float[40,16] again) => (float[B,40] y, float[B,16] z)
{ e = Gather(table, i) y = MatMul(e, head) z = Gather(again, i) }"""


def tied(parse: Any) -> Graph:
    graph = parse(TIED)
    table = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    for name, values in (("table", table), ("head", np.ascontiguousarray(table.T)), ("again", table.copy())):
        graph.tensors()[name].to_constant(values)
    graph.inputs = graph.inputs[:1]
    return graph


def test_equal_and_tied_weights_are_stored_once_without_loss(parse):
    graph = tied(parse)
    feeds = {"i": np.array([3, 39, 0])}
    before = Session(graph).run(feeds)
    result = run(graph, bits=None)
    assert [done.rule for done in result.rewrites] == ["TransposedWeight", "EqualWeight"]
    assert {t.name for t in graph.tensors().values() if isinstance(t, Constant)} == {"table"}
    after = Session(graph).run(feeds)
    assert {name: value.tobytes() for name, value in after.items()} == {
        name: value.tobytes() for name, value in before.items()
    }


@pytest.mark.parametrize("stop_after", range(3))
def test_any_rewrite_can_be_the_last(stop_after, parse):
    graph = tied(parse)
    feeds = {"i": np.array([3, 39, 0])}
    before = Session(graph).run(feeds)
    assert len(run(graph, bits=None, stop_after=stop_after).rewrites) == stop_after
    for name, value in Session(graph).run(feeds).items():
        assert value.tobytes() == before[name].tobytes()


def test_a_layer_over_its_budget_stays_float(parse, random_feeds):
    graph = prepared(parse, PLACES["matmul"])
    result = run(graph, random_feeds(graph), bits=2, max_error=1e-4)
    assert result.rewrites == []
    assert "0.01% may" in result.kept["y"]
    assert operators(graph) == {"MatMul": 1}


def test_a_refused_rewrite_leaves_the_node(parse, random_feeds):
    graph = prepared(parse, PLACES["used twice"])
    assert len(run(graph, random_feeds(graph), stop_after=1).rewrites) == 1
    assert operators(graph)["MatMul"] == 1
    assert operators(graph)["CodebookMatMul"] == 1


def test_an_old_graph_is_raised(parse, random_feeds):
    graph = prepared(lambda text: parse(text, opset=13), PLACES["matmul"])
    run(graph, random_feeds(graph))
    assert graph.opset == 15
    assert len(products(graph)) == 1


def test_bad_data_is_refused(parse, random_feeds):
    graph = prepared(parse, PLACES["matmul"])
    with pytest.raises(LlmcError, match="share-weights needs calibration data: give --calibration DATA"):
        run(graph)
    load_values(graph.tensors()["w"])[0, 0] = np.nan
    with pytest.raises(LlmcError, match="weight 'w' of y has NaN or infinity"):
        run(graph, random_feeds(graph))


def test_convert_fp16_after_it_gives_a_product_in_half_precision(parse, random_feeds):
    graph = prepared(parse, PLACES["matmul"])
    feeds = random_feeds(graph)
    run(graph, feeds)
    before = Session(graph).run(feeds)["y"]
    ConvertFp16().run(graph, Context(activations=SampledActivations([feeds])))
    (node,) = products(graph)
    assert [tensor.dtype for tensor in node.inputs] == [np.float16, np.int32, np.float16]
    # Inputs, codebook and result are each rounded by 2^-11; 32 products.
    np.testing.assert_allclose(Session(graph).run(feeds)["y"], before, rtol=0, atol=2e-3 * np.abs(before).max())


# Codebooks


def scalar_kmeans_error(values: Array, weights: Array, centres: Array) -> float:
    return float((weights * ((values[:, None] - centres[None, :]) ** 2).min(axis=1)).sum())


def best_error(values: Array, weights: Array, entries: int) -> float:
    """Of the best codebook there is, by dynamic programming over the sorted values."""
    order = np.argsort(values)
    x, w = values[order].astype(float), weights[order].astype(float)
    total, first, second = (np.concatenate([[0], np.cumsum(part)]) for part in (w, w * x, w * x * x))

    def cost(i: int, j: int) -> float:
        mass = total[j] - total[i]
        return float(second[j] - second[i] - (first[j] - first[i]) ** 2 / mass) if mass > 0 else 0.0

    best = [0.0] + [np.inf] * len(x)
    for _ in range(entries):
        best = [0.0, *(min(best[i] + cost(i, j) for i in range(j)) for j in range(1, len(x) + 1))]
    return best[-1]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from([2, 4]), st.sampled_from(["normal", "laplace", "uniform"]))
def test_k_means_comes_near_to_the_best_codebook(seed: int, entries: int, shape: str) -> None:
    rng = np.random.default_rng(seed)
    values = getattr(rng, shape)(size=40).astype(np.float32)
    weights = rng.uniform(0.1, 2, 40).astype(np.float32)
    centres = kmeans(values[None], weights[None], entries)[0]
    found = scalar_kmeans_error(values, weights, centres)
    even = scalar_kmeans_error(values, weights, np.linspace(values.min(), values.max(), entries))
    least = best_error(values, weights, entries)
    assert least * (1 - 1e-5) <= found <= even  # not below what is possible: float32 sums
    assert (np.diff(centres) >= 0).all()


def test_values_that_weigh_nothing_do_not_matter_unless_all_do() -> None:
    values = np.float32([[0, 1, 100, 101]])
    np.testing.assert_allclose(kmeans(values, np.float32([[1, 1, 0, 0]]), 2), [[0, 1]], atol=1e-4)
    np.testing.assert_allclose(kmeans(values, np.zeros((1, 4), np.float32), 2), [[0.5, 100.5]])


def scattered(parts: Array, layout: Layout, shape: tuple[int, int]) -> Array:
    """What `Layout.parts` cut, put together again."""
    cut = parts.reshape(layout.groups, layout.blocks, shape[0] // layout.groups, shape[1] // layout.blocks)
    return cut.swapaxes(1, 2).reshape(shape)


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(6, 1), Layout(2, 3), Layout(6, 3)], ids=str)
def test_making_up_for_errors_makes_the_output_s_smaller(layout: Layout) -> None:
    """On average over twenty weights: for one of them the greedy order may well lose."""
    made_up = plain = 0.0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        matrix = rng.standard_normal((6, 24)).astype(np.float32)
        rows = rng.standard_normal((200, 24)) @ rng.standard_normal((24, 24))
        hessian = (rows.T @ rows / 200).astype(np.float32)
        shared = share(matrix, layout, 4, hessian)
        codebooks, parts = shared.codebooks.reshape(layout.count, 4), layout.parts(matrix)
        nearest = np.abs(parts[:, :, None] - codebooks[:, None, :]).argmin(axis=2)
        rounded = scattered(np.take_along_axis(codebooks, nearest, axis=1), layout, matrix.shape)
        for moved, together in ((shared.matrix() - matrix, True), (rounded - matrix, False)):
            error = float(((moved @ hessian) * moved).sum())
            made_up, plain = made_up + error * together, plain + error * (not together)
    assert made_up < plain


RECIPE = """
passes: [{share-weights: {bits: 4}}, convert-fp16]
target: {kind: tensorrt-rtx, compute_capabilities: [80]}
verify: {budgets: {cosine: 0.98}}  # 16 values for normal weights: 1% of their power
"""


@pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason="TensorRT-RTX is not installed")
def test_a_model_is_verified_and_built_through_the_body(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[4,256] x, float[256,512] w) => (float[4,512] y) { y = MatMul(x, w) }"""
    model = onnx.parser.parse_model(text)
    values = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    del model.graph.input[1]
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    report = run_compile(str(tmp_path / "model.onnx"), tmp_path / "recipe.yaml", tmp_path / "out")
    assert report.status == "done"
    assert [layer.found for layer in report.precision] == ["int4 weights"]
    weights = int(str(report.target.facts["weights_bytes"]))  # type: ignore[union-attr]
    assert weights < values.size, "indices, not the weights that they stand for, are in the engine: half a byte each"
