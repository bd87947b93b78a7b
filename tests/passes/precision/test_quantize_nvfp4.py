"""quantize-nvfp4: against ONNX's reference evaluator and the format's definition, and built by TensorRT-RTX."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import pytest

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.session import Session
from llmc.compiler.targets import BuildRequest, Range
from llmc.compiler.targets.tensorrt import TensorRT
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.base import Context, Ledger, LlmcError, PassResult, Skip
from llmc.passes.graph import Array, Graph, save_model, to_model
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.precision.quantize_nvfp4 import QuantizeNvfp4

RTX = pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason=availability("tensorrt-rtx").missing)
SHARED = "(float[N,5,64] x) => (float[N,5,48] a, float[N,5,32] b) { a = MatMul(x, w) b = MatMul(x, v) }"
FIRES = {
    "matmul": ("(float[N,5,64] x) => (float[N,5,48] y) { y = MatMul(x, w) }", {"w": (64, 48)}, 1),
    "gemm": ("(float[N,64] x, float[48] b) => (float[N,48] y) { y = Gemm(x, w, b) }", {"w": (64, 48)}, 1),
    "gemm, transB": ("(float[N,64] x) => (float[N,48] y) { y = Gemm <transB=1> (x, w) }", {"w": (48, 64)}, 1),
    "two of one activation": (SHARED, {"w": (64, 48), "v": (64, 32)}, 2),
    "one weight twice": (
        "(float[N,64] x) => (float[N,64] y) { a = MatMul(x, w) r = Relu(a) y = MatMul(r, w) }",
        {"w": (64, 64)},
        2,
    ),
}
NODES = {"Abs": 1, "DequantizeLinear": 2, "Max": 1, "QuantizeLinear": 2, "ReduceMax": 1, "Reshape": 1}
"""Of an activation."""


def weighted(text: str, shapes: dict[str, tuple[int, ...]], parse: Any, opset: int = 20) -> Graph:
    """A graph with random constants."""
    head, _, body = text.partition(") =>")
    declared = "".join(f", float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    graph: Graph = parse(f"{head}{declared}) =>{body}", opset=opset)
    for tensor in list(graph.inputs):
        if tensor.name in shapes:
            graph.inputs.remove(tensor)
            values = np.random.default_rng([0, *tensor.shape]).standard_normal(tensor.shape)
            tensor.to_constant(values.astype(np.float32))
    return graph


def quantized(graph: Graph, feeds: dict[str, Array], ledger: Ledger | None = None, **settings: Any) -> PassResult:
    activations = SampledActivations([feeds])
    result = QuantizeNvfp4(**settings).run(graph, Context(ledger or Ledger(), activations))
    onnx.checker.check_model(to_model(graph), full_check=True)
    return result


@pytest.mark.parametrize("name", FIRES)
def test_fires_and_computes_what_onnx_says(name: str, parse: Any, random_feeds: Any) -> None:
    text, shapes, products = FIRES[name]
    graph = weighted(text, shapes, parse)
    feeds = random_feeds(graph)
    whole = Session(graph).run(feeds)
    result = quantized(graph, feeds)
    assert set(result.asked.values()) == {"float4_e2m1fn"}
    assert len(result.rewrites) == products
    assert graph.opset == 23
    activations = 2 if name == "one weight twice" else 1
    counts = Counter(node.op for node in graph.nodes)
    assert counts["DequantizeLinear"] == 2 * activations + 2 * len(shapes)
    assert {op: counts[op] for op in NODES if op != "DequantizeLinear"} == {
        op: count * activations for op, count in NODES.items() if op != "DequantizeLinear"
    }
    found = Session(graph).run(feeds)
    expected = onnx.reference.ReferenceEvaluator(to_model(graph)).run(None, feeds)
    for tensor, values in zip(graph.outputs, expected, strict=True):
        # The same products of float32, 64 of them added in another order.
        bound = 64 * 2.0**-23 * np.abs(values).max()
        np.testing.assert_allclose(found[tensor.name], values, rtol=0, atol=bound)
        # Two factors of 4 bits are each some 10 % off; two layers of them, half as much more.
        assert np.linalg.norm(values - whole[tensor.name]) < 0.25 * np.linalg.norm(whole[tensor.name])


def test_activations_are_rounded_as_the_format_says(parse: Any) -> None:
    """Multiplied by the identity, which NVFP4 has exactly."""
    graph = parse("(float[N,64] x, float[64,64] w) => (float[N,64] y) { y = MatMul(x, w) }")
    graph.inputs[1].to_constant(np.eye(64, dtype=np.float32))
    graph.inputs = graph.inputs[:1]
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((50, 64)) * 10.0 ** rng.integers(-3, 2, (50, 1))).astype(np.float32)
    x[0, :16] = 0
    quantized(graph, {"x": x})
    whole = 2.0 ** np.ceil(np.log2(np.abs(x).max() / (6 * 448)))
    blocks = x.reshape(50, 4, 16)
    amax = np.maximum(np.abs(blocks).max(-1), 6 * whole * 2.0**-9)
    scale = ((amax / np.float32(6 * whole)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole)[..., None]
    expected = np.clip(blocks / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
    np.testing.assert_array_equal(Session(graph).run({"x": x})["y"], expected.reshape(50, 64))
    # Half of the widest step, which is 2: no value of a block is off by more than a scale, and a scale is off by 2^-4.
    assert (np.abs(expected - blocks) <= scale * (1 + 6 * 2.0**-4)).all()


LEFT = {
    "depth of 40": (
        "(float[N,40] x) => (float[N,8] y) { y = MatMul(x, w) }",
        {"w": (40, 8)},
        "no multiple of the block",
    ),
    "two activations": (
        "(float[N,16] x, float[16,8] z) => (float[N,8] y) { c = MatMul(x, w) y = MatMul(c, z) }",
        {"w": (16, 16)},
        "multiplies two activations",
    ),
    "weight on the left": ("(float[16,4] x) => (float[8,4] y) { y = MatMul(w, x) }", {"w": (8, 16)}, "not one matrix"),
    "a stack of weights": (
        "(float[2,3,16] x) => (float[2,3,8] y) { y = MatMul(x, w) }",
        {"w": (2, 16, 8)},
        "not one matrix",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves_alone(name: str, parse: Any, random_feeds: Any) -> None:
    text, shapes, reason = LEFT[name]
    graph = weighted(text, shapes, parse)
    result = quantized(graph, random_feeds(graph))
    assert reason in result.kept["y"]
    assert all(rewrite.node != "y" for rewrite in result.rewrites)


def test_what_is_excluded_or_refused_stays(parse: Any, random_feeds: Any) -> None:
    text, shapes, _ = FIRES["two of one activation"]
    graph = weighted(text, shapes, parse)
    assert quantized(graph, random_feeds(graph), exclude=["a"]).kept == {"a": "excluded by 'a'"}
    graph = weighted(text, shapes, parse)
    assert list(quantized(graph, random_feeds(graph), Ledger(stop_after=1)).asked) == ["a"]


def test_silent_inputs_stay(parse: Any) -> None:
    text, shapes, _ = FIRES["matmul"]
    graph = weighted(text, shapes, parse)
    result = quantized(graph, {"x": np.zeros((1, 5, 64), np.float32)})
    assert "is 0 throughout" in result.kept["y"]
    assert result.rewrites == []


def test_weights_alone_need_no_data(parse: Any, random_feeds: Any) -> None:
    text, shapes, _ = FIRES["gemm, transB"]
    graph = weighted(text, shapes, parse)
    result = QuantizeNvfp4(activations=False).run(graph, Context())
    assert result.asked == {"y": "float4_e2m1fn weights"}
    assert [node.op for node in graph.nodes] == ["DequantizeLinear", "DequantizeLinear", "Gemm"]
    ((name, share),) = result.scales.clipped.items()
    assert (name, 0 <= share < 0.05) == ("w", True), "few values are clipped for the others' sake"
    assert sum(result.scales.weights.values()) == np.prod(shapes["w"]) / 16
    feeds = random_feeds(graph)
    (expected,) = onnx.reference.ReferenceEvaluator(to_model(graph)).run(None, feeds)
    bound = 64 * 2.0**-23 * np.abs(expected).max()  # 64 products, added in another order
    np.testing.assert_allclose(Session(graph).run(feeds)["y"], expected, rtol=0, atol=bound)


def test_it_asks_for_data_and_for_finite_weights(parse: Any, random_feeds: Any) -> None:
    text, shapes, _ = FIRES["matmul"]
    with pytest.raises(LlmcError, match="quantize-nvfp4 needs calibration data"):
        QuantizeNvfp4().run(weighted(text, shapes, parse), Context())
    graph = weighted(text, shapes, parse)
    feeds = random_feeds(graph)
    graph.tensors()["w"].values[0, 0] = np.nan
    with pytest.raises(LlmcError, match="'w' of y has NaN or infinity"):
        quantized(graph, feeds)
    with pytest.raises(Skip, match="no MatMul or Gemm with a constant weight"):
        QuantizeNvfp4().run(parse("(float[4] x) => (float[4] y) { y = Relu(x) }"), Context())


@RTX
@pytest.mark.parametrize("half", [True, False], ids=["float16", "float32"])
def test_tensorrt_multiplies_in_4_bits_from_sm120_on_and_is_not_asked_to_before(
    half: bool, parse: Any, random_feeds: Any, tmp_path: Path
) -> None:
    graph = weighted(SHARED, {"w": (64, 48), "v": (64, 32)}, parse)
    feeds = random_feeds(graph)
    quantized(graph, feeds)
    if half:
        before = Session(graph).run(feeds)
        ConvertFp16().run(graph, Context(activations=SampledActivations([feeds])))
        after = Session(graph).run(feeds)
        # Where a value lies between two numbers of 4 bits, its float16 may lie at the other: rare, and some 10 % each.
        assert all(np.linalg.norm(after[n] - before[n]) < 0.05 * np.linalg.norm(before[n]) for n in before)
    target, profile = TensorRT("tensorrt-rtx"), [{"N": Range(1, 4, 8)}]
    (refused,) = target.check(graph, BuildRequest(profile, [89, 120]))
    assert "uses float4_e2m1fn, which SM89 cannot run; SM120, SM121 can" in refused
    request = BuildRequest(profile, [120, 121])
    assert target.check(graph, request) == []
    save_model(graph, tmp_path / "model.onnx")
    built = target.build(tmp_path / "model.onnx", tmp_path, request, lambda _: None)
    for name in "ab":
        products = {layer["product"] for layer in built.layers if name in layer["nodes"]}  # type: ignore[operator]
        assert products - {""} == {"float4_e2m1fn"}
