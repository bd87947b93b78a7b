"""Weights in INT4, end to end: engines where the hardware has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from llmc.compiler import compile as run_compile
from llmc.compiler.errors import TargetError
from llmc.compiler.targets.engine_header import read
from llmc.compiler.targets.tensorrt_import import availability

needs_rtx = pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason="TensorRT-RTX is not installed")
RECIPE = """
passes: [{quantize-weights: {method: rtn, block: %s}}, convert-fp16]
target: {kind: tensorrt-rtx, compute_capabilities: [%s]}
verify: {budgets: {cosine: 0.98}}  # rounding moves each of 64 weights by up to 1/14 of the largest of its block
"""
MODEL = """<ir_version: 10, opset_import: ["": 21]>
g (float[4,64] x, float[64,128] w, float[32,128] v) => (float[4,32] y)
{ a = MatMul(x, w) r = Relu(a) y = Gemm <transB=1> (r, v) }"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = onnx.parser.parse_model(MODEL)
    for tensor in list(made.graph.input)[1:]:
        shape = [d.dim_value for d in tensor.type.tensor_type.shape.dim]
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        made.graph.initializer.append(onnx.numpy_helper.from_array(values, tensor.name))
        made.graph.input.remove(tensor)
    onnx.save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def compiled(model: Path, block: object, capabilities: str) -> Path:
    recipe = model.with_name("recipe.yaml")
    recipe.write_text(RECIPE % (block, capabilities), encoding="utf-8")
    report = run_compile(str(model), recipe, model.with_name("out"))
    assert {layer.found for layer in report.precision} == {"int4 weights"}
    assert report.status == "done"
    return model.with_name("out") / "model.engine"


@needs_rtx
@pytest.mark.parametrize("block", [16, 32, 64, "channel"])
def test_engines_are_built_for_every_gpu_that_has_int4(block: object, model: Path) -> None:
    header = read(compiled(model, block, "80, 86, 89, 120, 121"))
    assert list(header.compute_capabilities) == [80, 86, 89, 120, 121]


@needs_rtx
def test_gpus_without_int4_are_refused_by_name(model: Path) -> None:
    with pytest.raises(TargetError, match=r"uses int4, which SM75 cannot run; SM80, SM86, SM89, SM120, SM121 can"):
        compiled(model, 32, "75, 80")
    assert not model.with_name("out").exists()
