"""What a matrix product loses by quantization, against the quantized product itself in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.session import Session
from llmc.passes.base import LlmcError
from llmc.passes.graph import Array, Graph, Node, in_parts
from llmc.passes.precision import matrix_losses
from llmc.passes.precision.insert_qdq import Inserter
from llmc.passes.precision.levels import FP8, INT8, Levels
from llmc.passes.precision.matrix_losses import MatrixProduct, Sums, is_matrix_product
from llmc.passes.precision.products import Product, as_product

FORMS = {
    "matmul": "y = MatMul(x, w)",
    "gemm": "y = Gemm(x, w)",
    "gemm with a bias": "y = Gemm(x, w, b)",
    "the other way round": "y = Gemm<transB=1>(x, w, b)",
}


def product_of(parse: Any, body: str, dtype: Any, weight: Array) -> tuple[Graph, Product]:
    depth, channels = weight.shape[::-1] if "transB" in body else weight.shape
    kind = {"float32": "float", "float16": "float16"}[np.dtype(dtype).name]
    sizes = f"{kind}[n, {depth}] x, {kind}[{weight.shape[0]}, {weight.shape[1]}] w, {kind}[{channels}] b"
    graph = parse(f"({sizes}) => ({kind}[n, {channels}] y) {{ {body} }}")
    bias = np.linspace(-1, 1, channels).astype(dtype)
    for tensor in list(graph.inputs)[1:]:
        tensor.to_constant(weight.astype(dtype) if tensor.name == "w" else bias)
    graph.inputs = graph.inputs[:1]
    (node,) = graph.nodes
    found = as_product(node, attention=False)
    assert isinstance(found, Product)
    return graph, found


def sums_in_onnx_runtime(graph: Graph, product: Product, levels: Levels, amax: dict[str, float], rows: Array) -> Sums:
    exact = Session(graph).run({"x": rows})["y"].astype(np.float64)
    inserter = Inserter(graph, levels)
    inserter.quantize(product, amax)
    inserter.finish()
    off = exact - Session(graph).run({"x": rows})["y"].astype(np.float64)
    return Sums(off.size, float((exact**2).sum()), float((off**2).sum()), off.sum(axis=0))


@pytest.mark.parametrize("body", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("levels", [INT8, FP8], ids=["int8", "fp8"])
@settings(max_examples=12)
@given(seed=st.integers(0, 1 << 16), dtype=st.sampled_from(["float32", "float16"]), part=st.sampled_from([64, 1 << 20]))
def test_is_what_the_quantized_product_loses(parse: Any, body: str, levels: Levels, seed: int, dtype: str, part: int):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((int(rng.integers(1, 40)), 24)).astype(dtype)
    weight = rng.standard_normal((24, 10))
    graph, product = product_of(parse, body, dtype, weight.T if "transB" in body else weight)
    amax = {"x": float(np.abs(rows).max()) * 0.8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_losses, "PART", part)
        patch.setattr(in_parts, "PART", part)
        found = MatrixProduct(product, levels, amax).sums(rows)
    expected = sums_in_onnx_runtime(graph, product, levels, amax, rows)
    # Sums of 24 products in another order: 24 units of float32 of results of about 5. Where results are float16, the
    # last bit of one may so fall the other way: 2^-8 of a result between 4 and 8, which few of them do.
    slack = 1e-4 if dtype == "float32" else 2.0**-8
    assert found.values == expected.values
    assert found.signal == pytest.approx(expected.signal, rel=slack)
    assert found.noise == pytest.approx(expected.noise, rel=1e-3 if dtype == "float32" else 2e-2)
    np.testing.assert_allclose(found.total, expected.total, atol=slack * len(rows))


def test_rows_count_the_same_together_and_apart(parse: Any) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, 24)).astype(np.float32)
    _, product = product_of(parse, FORMS["matmul"], np.float32, rng.standard_normal((24, 10)))
    measured = MatrixProduct(product, INT8, {"x": 3.0})
    whole, *parts = (measured.sums(part) for part in (rows, rows[:11], rows[11:]))
    assert whole.values == sum(part.values for part in parts)
    assert whole.noise == pytest.approx(sum(part.noise for part in parts), rel=1e-4)  # BLAS sums in another order
    np.testing.assert_allclose(whole.total, sum(part.total for part in parts), atol=1e-4)


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        ("y = MatMul(x, w)", True),
        ("y = Gemm<transB=1>(x, w, b)", True),
        ("y = Gemm<alpha=2.0>(x, w)", False),
        ("y = Gemm<beta=2.0>(x, w, b)", False),
        ("y = Gemm<transA=1>(x, w)", False),
    ],
)
def test_takes_plain_products(parse: Any, body: str, taken: bool) -> None:
    _, product = product_of(parse, body, np.float32, np.ones((8, 8)))
    assert is_matrix_product(product) is taken


def test_a_weight_that_is_the_left_factor_is_left_to_others(parse: Any) -> None:
    graph = parse("(float[8, n] x, float[4, 8] w) => (float[4, n] y) { y = MatMul(w, x) }")
    graph.inputs.pop().to_constant(np.ones((4, 8), np.float32))
    node: Node = graph.nodes[0]
    found = as_product(node, attention=False)
    assert isinstance(found, Product)
    assert not is_matrix_product(found)


def test_a_weight_with_nan_is_refused(parse: Any) -> None:
    _, product = product_of(parse, FORMS["matmul"], np.float32, np.full((8, 8), np.nan))
    with pytest.raises(LlmcError, match=r"'w' of .* has NaN"):
        MatrixProduct(product, INT8, {"x": 1.0})
