"""docs/compute-capabilities.md: for which GPUs each recipe builds an engine, and why not for the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.precision import Asked, fallbacks
from llmc.compiler.recipe import Recipe
from llmc.compiler.targets import BuildRequest, Range
from llmc.compiler.targets.tensorrt import TensorRT
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.base import Context, Skip
from llmc.passes.graph import Graph, from_model, save_model

pytestmark = pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason="TensorRT-RTX is not installed")
TABLE = Path(__file__).parent.parent / "docs" / "compute-capabilities.md"
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
REASONS = {
    "a": "TensorRT-RTX does not build for SM",
    "b": "is a float32 matrix product, which SM",
    "c": "uses bfloat16, which SM",
    "d": "uses int4, which SM",
    "e": "uses float8_e4m3fn, which SM",
    "f": "uses float4_e2m1fn, which SM",
}
"""As the table calls it → what the refusal says, up to the number."""
MODEL = """<ir_version: 10, opset_import: ["": 20]>
encoder (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask, int64[batch,sequence] token_type_ids,
         float[50,64] words, float[2,64] kinds, float[64,128] up, float[128,64] down, float[64] scale, float[64] shift)
      => (float[batch,sequence,64] hidden) {
    word = Gather(words, input_ids)
    kind = Gather(kinds, token_type_ids)
    sum = Add(word, kind)
    wide = MatMul(sum, up)
    active = Gelu(wide)
    narrow = MatMul(active, down)
    one = Constant <value = int64[1] {-1}> ()
    mask = Unsqueeze(attention_mask, one)
    weight = Cast <to = 1> (mask)
    seen = Mul(narrow, weight)
    both = Add(sum, seen)
    hidden = LayerNormalization(both, scale, shift)
}"""
SIZES = [{"batch": Range(1, 2, 4), "sequence": Range(1, 8, 16)}]


@dataclass(frozen=True)
class Outcome:
    """What the passes of a recipe make of the encoder, and what they asked of its layers."""

    graph: Graph
    asked: Asked


def encoder() -> Graph:
    """A text encoder of one layer, with the inputs that BERT has."""
    model = onnx.parser.parse_model(MODEL)
    rng = np.random.default_rng(0)
    for info in list(model.graph.input)[3:]:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype("f"), info.name))
        model.graph.input.remove(info)
    return from_model(model)


@cache
def compiled(name: str) -> Outcome:
    graph, asked, rng = encoder(), Asked(), np.random.default_rng(1)
    shape = (2, 8)
    ids = {"input_ids": rng.integers(0, 50, shape), "attention_mask": np.ones(shape, np.int64)}
    samples = [{**ids, "token_type_ids": rng.integers(0, 2, shape)}]
    for step in Recipe.load(name).passes:
        try:
            asked.remember(step.run(graph, Context(activations=SampledActivations(samples))))
        except Skip:
            continue
    return Outcome(graph, asked)


def rows() -> dict[str, list[str]]:
    """Recipe → what the table says of each compute capability."""
    lines = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines}


def cell(outcome: Outcome, capability: int) -> str:
    """'yes' where nothing speaks against an engine, else the reasons."""
    problems = TensorRT("tensorrt-rtx").check(outcome.graph, BuildRequest(SIZES, [capability]))
    found = {key for problem in problems for key, text in REASONS.items() if f"{text}{capability}" in problem}
    assert bool(found) == bool(problems)
    return " ".join(sorted(found)) or "yes"


def test_the_table_has_every_recipe_and_every_reason() -> None:
    shipped = {path.stem for path in (TABLE.parent.parent / "configs").glob("*.yaml")}
    # Those for ONNX Runtime make no engine; those for MiniLM are fp16 and int8 with its sizes and sentences.
    assert rows().keys() == {name for name in shipped if not name.startswith(("onnxruntime-", "minilm-"))}
    text = TABLE.read_text(encoding="utf-8")
    assert " | ".join(f"SM{sm}" for sm in CAPABILITIES) in text
    for key, reason in REASONS.items():
        assert re.search(rf"^- \*\*{key}\*\* `{re.escape(reason)}", text, re.MULTILINE)


@pytest.mark.parametrize("name", rows())
def test_refusals_are_those_of_the_table(name: str) -> None:
    assert [cell(compiled(name), capability) for capability in CAPABILITIES] == rows()[name]


BUILDS = [
    (name, sm) for name, cells in rows().items() for sm, cell in zip(CAPABILITIES, cells, strict=True) if cell == "yes"
]
SAMPLE = {("nvfp4", 120), ("fp16", 75)}


@pytest.mark.parametrize(
    ("name", "capability"),
    [pytest.param(*build, marks=() if build in SAMPLE else pytest.mark.slow) for build in BUILDS],
)
def test_the_others_build_in_the_precision_asked_for(
    name: str, capability: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    outcome = compiled(name)
    save_model(outcome.graph, tmp_path / "model.onnx")
    request = BuildRequest(SIZES, [capability])
    built = TensorRT("tensorrt-rtx").build(tmp_path / "model.onnx", tmp_path, request, lambda _: None)
    record_property("engine_bytes", (tmp_path / "model.engine").stat().st_size)
    assert built.facts["compute_capabilities"] == [capability]
    assert built.layers
    assert fallbacks(outcome.asked.layers(outcome.graph, built.layers)) == []
