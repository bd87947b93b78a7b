"""Precision asked for, found in the graph, and computed by an engine that TensorRT-RTX really builds."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.cli import app
from llmc.compiler.errors import PrecisionError
from llmc.compiler.precision import LINES_SHOWN, Asked, fallbacks, some
from llmc.compiler.report import LayerPrecision
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.base import PassResult

needs_rtx = pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason=availability("tensorrt-rtx").missing)
PRODUCT = "(float[N,4] x, float[4,4] w) => (float[N,4] y) { [mm] y = MatMul(x, w) }"


def layer(**what: str) -> LayerPrecision:
    return LayerPrecision(**{"node": "mm", "op": "MatMul", "asked": "int8", "found": "int8", **what})


@pytest.mark.parametrize(
    ("what", "line"),
    [
        (layer(), ""),
        (layer(engine="int8"), ""),
        (layer(found="float16"), "MatMul 'mm' was asked to be int8, and is float16"),
        (layer(found="float16", reason="`exclude` names it", engine="float16"), ""),
        (layer(engine="float16"), "MatMul 'mm' is int8 in the graph, but the engine computes it in float16"),
        (layer(engine="float16", module="encoder.0"), "MatMul 'mm' (encoder.0) is int8 in the graph, but the engine"),
        # a reason is for the graph: nobody gave one for what the engine does
        (layer(engine="float16", reason="a reason"), "MatMul 'mm' is int8 in the graph, but the engine computes it in"),
        (layer(asked="int8 weights", found="int8 weights", engine="float16"), ""),  # they are dequantized, as asked
        (
            layer(asked="float8_e4m3fn", found="float8_e4m3fn", engine="float32"),
            "but the engine computes it in float32",
        ),
    ],
)
def test_a_fallback_is_what_no_pass_gave_a_reason_for(what: LayerPrecision, line: str) -> None:
    lines = fallbacks([what])
    assert len(lines) == bool(line)
    assert line in "".join(lines)


def test_of_two_passes_the_narrower_counts() -> None:
    asked = Asked()
    asked.remember(PassResult(asked={"a": "int8", "b": "float16"}, kept={"c": "why"}))
    asked.remember(PassResult(asked={"a": "float16", "b": "int8"}))
    assert asked == Asked({"a": "int8", "b": "int8"}, {"c": "why"})


def test_a_node_in_several_engine_layers_counts_as_the_widest(parse: Any) -> None:
    engine = [
        {"product": "int8", "nodes": ["mm", "other"]},
        {"product": "float16", "nodes": ["mm"]},
        {"product": "", "nodes": ["mm"]},
        {"product": "E8M0", "nodes": ["mm"]},
    ]
    (found,) = Asked().layers(parse(PRODUCT), engine)
    assert (found.asked, found.found, found.engine) == ("float32", "float32", "float16")


def test_many_lines_are_cut() -> None:
    assert some(["a", "b"]) == "\n  a\n  b"
    assert some(["a"] * (LINES_SHOWN + 3)).endswith("\n  a\n  and 3 more, in the report")


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """The arguments that compile an INT8 product for queries, keys and values, which TensorRT-RTX 1.7 does in float16.

    It moves the Split in front of the product, and finds that it cannot move it into the quantized weight.
    """
    width = 64
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 23]>
        g (float16[batch,sequence,{width}] x) => (float16[batch,sequence,{width}] y) {{
          [q] quantized = QuantizeLinear(x, s, z)
          [dq] a = DequantizeLinear(quantized, s, z)
          [wdq] b = DequantizeLinear <axis = 1> (w, ws)
          [product] p = MatMul(a, b)
          [bias] c = Add(p, bias)
          [split] queries, keys, values = Split <axis = 2> (c, sizes)
          [attend] y = Attention <q_num_heads = 2, kv_num_heads = 2> (queries, keys, values)
        }}"""
    )
    rng = np.random.default_rng(0)
    values = {
        "s": np.array(0.1, np.float16),
        "z": np.array(0, np.int8),
        "w": rng.integers(-127, 128, (width, 3 * width)).astype(np.int8),
        "ws": np.full(3 * width, 0.01, np.float16),
        "bias": np.ones(3 * width, np.float16),
        "sizes": np.array([width] * 3),
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in values.items())
    onnx.save(model, tmp_path / "model.onnx")
    recipe = "passes: [eliminate-dead]\ntarget: {kind: tensorrt-rtx, compute_capabilities: [89]}\n"
    recipe += "model: {dimensions: {batch: [1, 2, 4], sequence: [1, 8, 16]}}\nverify: {samples: 1}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    return ["compile", tmp_path / "model.onnx", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out"]


def llmc(*words: object) -> None:
    app([str(word) for word in words], standalone_mode=False)


@needs_rtx
def test_an_engine_that_falls_back_in_silence_is_an_error(words: list[object], tmp_path: Path) -> None:
    with pytest.raises(PrecisionError) as stopped:
        llmc(*words)
    assert stopped.value.exit_code == 4
    message = str(stopped.value)
    assert "MatMul 'product' is int8 in the graph, but the engine computes it in float16" in message
    assert not (tmp_path / "out").exists()
    failed = tmp_path / "out.failed"
    assert {path.name for path in (failed / "repro").iterdir()} == {
        "final.onnx",
        "inputs",
        "loaded.onnx",
        "recipe.yaml",
    }
    report = json.loads((failed / "report.json").read_text())
    assert report["status"] == "fell back"
    (product,) = (found for found in report["precision"] if found["node"] == "product")
    assert (product["found"], product["engine"]) == ("int8", "float16")
    with pytest.raises(PrecisionError) as again:
        llmc(*shlex.split(message.splitlines()[-1])[1:])
    assert str(again.value).splitlines()[:2] == message.splitlines()[:2]


@needs_rtx
def test_a_recipe_may_allow_it(words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llmc(*words, "--set", "verify.on_fallback=warn")
    assert (tmp_path / "out/model.engine").stat().st_size > 0
    assert "but the engine computes it in float16" in " ".join(capsys.readouterr().out.split())
