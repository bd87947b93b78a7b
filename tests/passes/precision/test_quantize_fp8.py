"""quantize-fp8: what it puts into the graph, against FP8 as ml_dtypes rounds it, and what TensorRT-RTX builds of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.session import Session
from llmc.compiler.targets import BuildRequest, Range
from llmc.compiler.targets.tensorrt import TensorRT
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.base import Context, LlmcError
from llmc.passes.graph import Array, Graph, load_values, save_model
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.precision.levels import FP8
from llmc.passes.precision.quantize_fp8 import QuantizeFp8

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
RTX = pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason=availability("tensorrt-rtx").missing)


def rounded(values: Array, scale: Array) -> Array:
    """What FP8 holds of the values, in float64."""
    levels = np.clip(values.astype(np.float64) / scale, -448, 448).astype(np.float32).astype(E4M3)
    return levels.astype(np.float64) * scale


FIRES = {
    "matmul": ("(float[N,16] x, float[16,8] w) => (float[N,8] y) { y = MatMul(x, w) }", 1),
    "gemm, transB": ("(float[N,16] x, float[8,16] w) => (float[N,8] y) { y = Gemm <transB = 1> (x, w) }", 0),
    "conv": ("(float[N,3,8,8] x, float[4,3,3,3] w) => (float[N,4,6,6] y) { y = Conv(x, w) }", 0),
}


def quantized(text: str, parse: Any, opset: int = 20, seed: int = 0) -> tuple[Graph, dict[str, Array], Array]:
    """The graph with a constant w, quantized; what it was calibrated on; and its weight."""
    graph = parse(text, opset=opset)
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(graph.inputs[1].shape).astype(np.float32)
    graph.inputs[1].to_constant(w)
    graph.inputs = graph.inputs[:1]
    shape = [5, *graph.inputs[0].shape[1:]]
    feeds = {"x": rng.standard_normal(shape).astype(np.float32)}
    result = QuantizeFp8().run(graph, Context(activations=SampledActivations([feeds])))
    assert result.asked == {"y": "float8_e4m3fn"}
    return graph, feeds, w


@pytest.mark.parametrize("name", FIRES)
def test_fires_and_multiplies_what_fp8_holds_of_the_factors(name: str, parse: Any) -> None:
    text, axis = FIRES[name]
    graph, feeds, w = quantized(text, parse)
    assert [node.op for node in graph.nodes[:-1]] == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear"]
    stored, scale, zero = (load_values(tensor) for tensor in graph.nodes[2].inputs)
    assert stored.dtype == zero.dtype == E4M3
    spread = np.expand_dims(scale, [i for i in range(w.ndim) if i != axis]).astype(np.float64)
    np.testing.assert_array_equal(stored.astype(np.float64) * spread, rounded(w, spread))
    reach = np.abs(w).max(axis=tuple(i for i in range(w.ndim) if i != axis))
    assert (scale >= reach / 448 * (1 - 1e-6)).all()  # nothing clips
    assert (scale <= reach / 448 * (1 + 2.0**-9)).all()  # rounded up to float16: one step of 2^-10, and its rounding
    expected = parse(text)
    x = rounded(feeds["x"], load_values(graph.nodes[0].inputs[1]).astype(np.float64))
    truth = Session(expected).run({"x": x.astype(np.float32), "w": rounded(w, spread).astype(np.float32)})["y"]
    # the same float32 products, added in an order of their own: at most 27 of them
    np.testing.assert_allclose(Session(graph).run(feeds)["y"], truth, rtol=0, atol=27 * 2.0**-23 * np.abs(truth).max())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[4,4] x, float[4,4] z) => (float[4,4] y) { y = MatMul(x, z) }", "it multiplies two activations"),
        ("(float[4,4] x) => (float[4,4] y) <float[4] w = {1,2,3,4}> { m = MatMul(x, w) y = Add(x, m) }", "is a vector"),
        (
            "(double[2,2] x) => (double[2,2] y) <double[2,2] w = {1,2,3,4}> { y = MatMul(x, w) }",
            "its weight is float64; only float32 and float16 are quantized",
        ),
    ],
)
def test_leaves_alone(text: str, reason: str, parse: Any, random_feeds: Any) -> None:
    graph = parse(text)
    result = QuantizeFp8().run(graph, Context(activations=SampledActivations([random_feeds(graph)])))
    assert result.rewrites == []
    (said,) = result.kept.values()
    assert reason in said
    assert not any(node.op == "QuantizeLinear" for node in graph.nodes)


@settings(deadline=None)
@given(
    values=npst.arrays(np.float32, 16, elements=st.floats(-448, 448, width=32)),
    exponent=st.integers(-12, 12),
)
def test_a_value_moves_by_no_more_than_the_format_says(values: Array, exponent: int) -> None:
    scale = np.float32(2.0**exponent)
    found = FP8.quantize(values * scale, np.asarray(scale)).astype(np.float64)
    bound = np.maximum(2.0**-4 * np.abs(values.astype(np.float64)), 2.0**-10)
    assert (np.abs(found - values) <= bound).all()


def test_what_lies_beyond_the_calibrated_range_clips() -> None:
    assert FP8.quantize(np.array([1e9, -1e9, 470], np.float32), np.asarray(1.0)).astype(float).tolist() == [
        448,
        -448,
        448,
    ]


@pytest.mark.parametrize("opset", [13, 17])
def test_old_opsets_are_raised_to_where_fp8_is(opset: int, parse: Any) -> None:
    graph, _, _ = quantized(FIRES["matmul"][0], parse, opset=opset)
    assert graph.opset == 19


def test_it_asks_for_calibration_data_where_there_is_none(parse: Any) -> None:
    graph = parse("(float[4,4] x) => (float[4,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}> { y = MatMul(x, w) }")
    with pytest.raises(LlmcError, match="quantize-fp8 needs calibration data"):
        QuantizeFp8().run(graph, Context())


@RTX
def test_tensorrt_multiplies_in_fp8_from_sm89_on_and_is_not_asked_to_before(parse: Any, tmp_path: Path) -> None:
    text = "(float[N,64] x, float[64,64] w) => (float[N,64] y) { y = MatMul(x, w) }"
    graph, feeds, _ = quantized(text, parse)
    ConvertFp16().run(graph, Context(activations=SampledActivations([feeds])))
    target, profile = TensorRT("tensorrt-rtx"), [{"N": Range(1, 4, 8)}]
    (refused,) = target.check(graph, BuildRequest(profile, [80, 89]))
    assert "uses float8_e4m3fn, which SM80 cannot run; SM89, SM120, SM121 can" in refused
    request = BuildRequest(profile, [89, 120])
    assert target.check(graph, request) == []
    save_model(graph, tmp_path / "model.onnx")
    built = target.build(tmp_path / "model.onnx", tmp_path, request, lambda _: None)
    products = {layer["product"] for layer in built.layers if "y" in layer["nodes"]}  # type: ignore[operator]
    assert products - {""} == {"float8_e4m3fn"}
