"""Weights in INT4, end to end: engines where the hardware has it, and a trained model that still predicts its text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx.parser
import pytest

from llmc.compiler import compile as run_compile
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.errors import TargetError
from llmc.compiler.loaders import load
from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.compiler.targets.engine_header import read
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.base import Context, Skip
from llmc.passes.graph import Array, Graph, copy_graph
from llmc.passes.precision.quantize_weights import QuantizeWeights

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


# The trained language model

LENGTH = 256
"""Tokens of a window."""


@pytest.fixture(scope="module")
def language_model(tiny_llama: Path) -> Graph:
    graph = load(str(tiny_llama), cache="none").graph
    for step in Recipe.load("optimize").passes:
        try:
            step.run(graph, Context())
        except Skip:
            continue
    return graph


@pytest.fixture(scope="module")
def windows(tiny_llama: Path) -> Callable[[Sequence[str]], list[Array]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))

    def windows(texts: Sequence[str]) -> list[Array]:
        ids = np.array([i for t in texts for i in (0, *tokenizer.encode(t, add_special_tokens=False).ids)])
        return [ids[None, start : start + LENGTH + 1] for start in range(0, len(ids) - LENGTH, LENGTH)]

    return windows


def perplexity(graph: Graph, windows: Sequence[Array]) -> float:
    session, nats = Session(graph), []
    for ids in windows:
        feeds = {"input_ids": ids[:, :-1], "attention_mask": np.ones_like(ids[:, :-1])}
        logits = session.run(feeds)["logits"][0].astype(np.float64)
        nats += list(np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, ids[0, 1:, None], axis=-1)[:, 0])
    return math.exp(float(np.mean(nats)))


@pytest.mark.slow
def test_a_trained_model_still_predicts_its_text(
    language_model: Graph, windows: Callable[[Sequence[str]], list[Array]], documentation: ModuleType
) -> None:
    seen, unseen = windows(documentation.training()), windows(documentation.held_out())
    samples = [
        {"input_ids": ids[:, :-1], "attention_mask": np.ones_like(ids[:, :-1])} for ids in seen[:: len(seen) // 64][:64]
    ]
    whole = perplexity(language_model, unseen)
    found = {}
    for method in ("rtn", "awq", "gptq"):
        graph = copy_graph(language_model)
        result = QuantizeWeights(method=method, block=32).run(graph, Context(activations=SampledActivations(samples)))
        assert len(result.asked) >= 4 * 4, "four products in each of four layers, where projections are merged"
        found[method] = perplexity(graph, unseen) / whole
    assert found["awq"] < 1.03
    assert found["gptq"] < 1.03
    assert found["awq"] < found["rtn"]
    assert found["gptq"] < found["rtn"]
