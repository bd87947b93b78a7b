from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llmc.compiler.planning import plan
from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.passes.base import Context, LlmcError, PassResult
from llmc.passes.decompose.decompose_quantized import DecomposeQuantized
from llmc.passes.graph import Array, Constant, Graph, copy_graph, load_values, save_model, to_model
from llmc.passes.precision.fuse_matmul_nbits import FuseMatmulNbits
from llmc.passes.precision.quantize_weights import QuantizeWeights

MATMUL = "(float[B,3,64] x, float[64,7] w) => (float[B,3,7] y) { y = MatMul(x, w) }"
PLACES = {
    "matmul": MATMUL,
    "gemm": "(float[B,64] x, float[64,7] w) => (float[B,7] y) { y = Gemm(x, w) }",
    "gemm, transB, bias": (
        "(float[B,64] x, float[7,64] w, float[7] b) => (float[B,7] y) { y = Gemm <transB=1> (x, w, b) }"
    ),
    "half precision": "(float16[B,3,64] x, float16[64,7] w) => (float16[B,3,7] y) { y = MatMul(x, w) }",
}


def prepared(parse, text: str, **parameters) -> Graph:
    graph = parse(text, opset=21)
    for tensor in list(graph.inputs)[1:]:
        values = np.random.default_rng(len(tensor.shape)).standard_normal(tensor.shape) + 0.5
        tensor.to_constant(values.astype(tensor.dtype))
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    if parameters:
        QuantizeWeights(method="rtn", **parameters).run(graph, Context())
    return graph


def run(graph: Graph, **parameters) -> PassResult:
    return FuseMatmulNbits(**parameters).run(graph, Context())


def operators(graph: Graph) -> dict[str, int]:
    return dict(Counter(node.op for node in graph.nodes))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 64])
def test_it_computes_the_same(place, bits, symmetric, block, parse, random_feeds):
    graph = prepared(parse, PLACES[place], bits=bits, symmetric=symmetric, block=block)
    reference = copy_graph(graph)
    assert len(run(graph).rewrites) == 1
    assert operators(graph) == {"MatMulNBits": 1}
    feeds = random_feeds(graph)
    expected, found = (Session(g).run(feeds)["y"].astype(np.float64) for g in (reference, graph))
    # The same products, summed in another order: 64 terms, float32 2^-24 each; float16's results are rounded by 2^-11,
    # and ONNX Runtime's kernel for them rounds the sums of blocks as well.
    bound = 64 * (2.0**-11 / 8 if place == "half precision" else 2.0**-24) * np.abs(expected).max()
    assert np.abs(found - expected).max() <= bound


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_decompose_quantized_takes_it_apart_again(bits, symmetric, parse, random_feeds):
    graph = prepared(parse, MATMUL, bits=bits, symmetric=symmetric, block=32)
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)["y"]
    run(graph)
    DecomposeQuantized().run(graph, Context())
    assert operators(graph) == {"DequantizeLinear": 1, "MatMul": 1}
    assert np.array_equal(Session(graph).run(feeds)["y"], expected)


def test_values_are_packed_low_half_first_in_rows(parse):
    graph = prepared(parse, MATMUL, block=32)
    levels: Array = load_values(graph.nodes[0].inputs[0]).astype(np.int8)
    run(graph, accuracy_level=4)
    (node,) = graph.nodes
    assert node.attrs == {"K": 64, "N": 7, "bits": 4, "block_size": 32, "accuracy_level": 4}
    packed = load_values(node.inputs[1])
    assert packed.shape == (7, 2, 16)
    assert np.array_equal(packed[3, 1] & 15, levels[32::2, 3] + 8)
    assert np.array_equal(packed[3, 1] >> 4, levels[33::2, 3] + 8)
    assert len(node.inputs) == 3
    assert [(o.domain, o.version) for o in to_model(graph).opset_import] == [("", 21), ("com.microsoft", 1)]


LEFT = {
    "a weight for each": (
        "(float[2,3,64] x, float[2,64,7] w) => (float[2,3,7] y) { y = MatMul(x, w) }",
        {"block": 32},
        "its weight has 3 axes",
    ),
    "a transposed activation": (
        "(float[64,B] x, float[64,7] w) => (float[B,7] y) { y = Gemm <transA=1> (x, w) }",
        {"block": 32},
        "it transposes or scales its first factor",
    ),
    "a bias for each row": (
        "(float[5,64] x, float[64,7] w, float[5,7] b) => (float[5,7] y) { y = Gemm (x, w, b) }",
        {"block": 32},
        "its bias is not one number for each output channel",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_it_leaves_alone(case, parse):
    text, parameters, reason = LEFT[case]
    graph = prepared(parse, text, **parameters)
    before = operators(graph)
    assert [miss.reason for miss in run(graph).near_misses] == [reason]
    assert operators(graph) == before


def test_it_leaves_one_scale_for_a_channel_and_other_weights_alone(parse):
    for parameters in ({"block": "channel"}, {}):
        result = run(prepared(parse, MATMUL, **parameters))
        assert not result.rewrites
        assert not result.near_misses


def test_a_weight_that_two_products_read_stays_for_the_other(parse, random_feeds):
    graph = prepared(
        parse,
        "(float[B,64] x, float[64,64] w) => (float[B,64] y, float[64,64] z)"
        "{ a = MatMul(x, w) y = MatMul(a, w) z = Relu(w) }",
        block=32,
    )
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)
    assert len(run(graph).rewrites) == 2
    found = Session(graph).run(feeds)
    assert np.allclose(found["y"], expected["y"], rtol=1e-5, atol=1e-5 * np.abs(expected["y"]).max())


def test_targets_that_lack_the_operator_refuse_it_before_anything_runs(parse, tmp_path: Path):
    save_model(prepared(parse, MATMUL.replace("B", "2")), tmp_path / "model.onnx")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [fuse-matmul-nbits]\ntarget: {kind: tensorrt-rtx}\n", encoding="utf-8")
    message = "fuse-matmul-nbits is for target onnxruntime or onnx, and the recipe builds for tensorrt-rtx"
    with pytest.raises(LlmcError, match=message):
        plan(str(tmp_path / "model.onnx"), recipe)
    made = plan(str(tmp_path / "model.onnx"), Recipe.load(recipe).with_values({"target.kind": "onnxruntime"}, "test"))
    assert made.target.kind == "onnxruntime"
