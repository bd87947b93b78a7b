"""quantize-mxfp8: against ONNX's reference evaluator and the format's definition; where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import pytest

from llmc.compiler import compile as run_compile
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.session import Session
from llmc.passes.base import Context, LlmcError
from llmc.passes.graph import Graph, save_model, to_model
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.precision.quantize_mxfp8 import QuantizeMxfp8

FIRES = {
    "matmul": "(float[N,5,64] x, float[64,48] w) => (float[N,5,48] y) { y = MatMul(x, w) }",
    "gemm, transB": "(float[N,64] x, float[48,64] w) => (float[N,48] y) { y = Gemm <transB=1> (x, w) }",
}


def weighted(text: str, parse: Any) -> Graph:
    graph: Graph = parse(text)
    values = np.random.default_rng(0).standard_normal(graph.inputs[1].shape)
    graph.inputs[1].to_constant(values.astype(np.float32))
    graph.inputs = graph.inputs[:1]
    return graph


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("name", FIRES)
def test_fires_and_computes_what_onnx_says(name: str, activations: bool, parse: Any, random_feeds: Any) -> None:
    graph = weighted(FIRES[name], parse)
    feeds = random_feeds(graph)
    whole = Session(graph).run(feeds)["y"]
    result = QuantizeMxfp8(activations=activations).run(graph, Context())
    assert result.asked == {"y": "float8_e4m3fn" if activations else "float8_e4m3fn weights"}
    assert graph.opset == 24
    model = to_model(graph)
    onnx.checker.check_model(model, full_check=True)
    (expected,) = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    bound = 64 * 2.0**-23 * np.abs(expected).max()  # 64 products, added in another order
    np.testing.assert_allclose(Session(graph).run(feeds)["y"], expected, rtol=0, atol=bound)
    # Each value is at most 1/16 of itself off.
    assert np.linalg.norm(expected - whole) < 2.0**-3 * np.linalg.norm(whole)


def test_activations_are_rounded_as_the_format_says(parse: Any) -> None:
    graph = parse("(float[N,64] x, float[64,64] w) => (float[N,64] y) { y = MatMul(x, w) }")
    graph.inputs[1].to_constant(np.eye(64, dtype=np.float32))
    graph.inputs = graph.inputs[:1]
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((50, 64)) * 10.0 ** rng.integers(-6, 6, (50, 1))).astype(np.float32)
    x[0, :32] = 0
    QuantizeMxfp8().run(graph, Context())
    blocks = x.reshape(50, 2, 32)
    amax = np.abs(blocks).max(-1, keepdims=True)
    scale = np.where(amax > 0, 2.0 ** np.ceil(np.log2(np.where(amax > 0, amax, 1) / 448)), 1)
    expected = (blocks / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(Session(graph).run({"x": x})["y"], expected.reshape(50, 64))


def test_float16_is_what_it_is_dequantized_to_where_the_rest_is(parse: Any, random_feeds: Any) -> None:
    graph = weighted(FIRES["matmul"], parse)
    feeds = random_feeds(graph)
    QuantizeMxfp8().run(graph, Context())
    before = Session(graph).run(feeds)["y"]
    result = ConvertFp16().run(graph, Context(activations=SampledActivations([feeds])))
    assert result.kept == {}
    onnx.checker.check_model(to_model(graph), full_check=True)
    # Where a value lies between two numbers of 8 bits, its float16 may lie at the other: rare, and some 6 % each.
    after = Session(graph).run(feeds)["y"]
    assert np.linalg.norm(after - before) < 0.03 * np.linalg.norm(before)


@pytest.mark.parametrize("kind", ["tensorrt-rtx", "onnxruntime"])
def test_targets_that_do_not_multiply_in_it_are_refused_with_the_reason(kind: str, parse: Any, tmp_path: Path) -> None:
    save_model(weighted(FIRES["gemm, transB"], parse), tmp_path / "model.onnx")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"passes: [quantize-mxfp8]\ntarget: {{kind: {kind}}}\n", encoding="utf-8")
    with pytest.raises(LlmcError, match=r"quantize-mxfp8 is for target onnx.*no MXFP8 product.*quantize-fp8"):
        run_compile(str(tmp_path / "model.onnx"), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
