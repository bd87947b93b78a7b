"""ONNX Runtime as a target: no file of its own, and the truth about whether it takes the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from llmc.compiler.errors import TargetError
from llmc.compiler.targets import BuildRequest, Range, onnxruntime
from llmc.compiler.targets.onnxruntime import SATURATES, OnnxRuntime, saturates
from llmc.passes.graph import save_model

TARGET = OnnxRuntime()
REQUEST = BuildRequest([{"n": Range(1, 2, 4)}])
RELU = "(float[n,4] x, int64[n] i) => (float[n,4] y, int64[n] j) { y = Relu(x) j = Identity(i) }"


def test_says_what_a_user_will_load(parse: Any, tmp_path: Path) -> None:
    graph = parse(RELU)
    (model,) = save_model(graph, tmp_path / "model.onnx")
    assert TARGET.check(graph, REQUEST) == []
    phases: list[str] = []
    built = TARGET.build(model, tmp_path, REQUEST, phases.append)
    assert phases == ["loading it in ONNX Runtime"]
    assert built.files == []
    assert built.facts == {
        "builder": "ONNX Runtime",
        "builder_version": TARGET.versions["onnxruntime"],
        "optimizations": "default",
        "providers": ["CPUExecutionProvider"],
        "inputs": ["x float32[n, 4]", "i int64[n]"],
        "outputs": ["y float32[n, 4]", "j int64[n]"],
    }
    assert list(tmp_path.iterdir()) == [model]


def test_a_large_model_is_loaded_without_a_copy_of_its_weights(
    parse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmc.compiler.targets.onnxruntime.WHOLE_BYTES", 8)
    (model,) = save_model(parse(RELU), tmp_path / "model.onnx")
    built = TARGET.build(model, tmp_path, REQUEST, lambda _phase: None)
    assert built.facts["optimizations"] == "not tried: they would copy the weights"


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_where_products_saturate_that_is_said(
    parse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, here: bool
) -> None:
    monkeypatch.setattr(onnxruntime, "saturates", lambda: here)
    graph = parse(f"(uint8[n,4] x, {kind}[4,2] w) => (int32[n,2] y) {{ y = MatMulInteger(x, w) }}")
    (model,) = save_model(graph, tmp_path / "model.onnx")
    warnings = TARGET.build(model, tmp_path, REQUEST, lambda _phase: None).warnings
    assert warnings == ([SATURATES] if here and kind == "int8" else [])


def test_whether_products_saturate_here_is_tried() -> None:
    """Without the session option that the warning names, and with it, by NumPy."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(200, 256, (5, 64)).astype(np.uint8), rng.integers(-128, -100, (64, 32)).astype(np.int8)
    text = (
        """<ir_version: 8, opset_import: ["": 10]> g (uint8[n,64] x) => (int32[n,32] y) { y = MatMulInteger(x, w) }"""
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    exact = []
    for setting in ("0", "1"):
        options = ort.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", setting)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(None, {"x": x})[0]
        exact.append(bool((found == x.astype(np.int64) @ w.astype(np.int64)).all()))
    assert exact == [not saturates(), True]


def test_what_is_larger_than_memory_is_not_loaded(parse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not tried in vain, and not passed over in silence."""
    monkeypatch.setattr(onnxruntime, "memory_bytes", lambda: 8)
    (model,) = save_model(parse(RELU), tmp_path / "model.onnx")
    size = model.stat().st_size
    model.write_bytes(bytes(size))  # would not load
    built = TARGET.build(model, tmp_path, REQUEST, lambda _phase: None)
    assert built.warnings == [
        f"model.onnx was not loaded in ONNX Runtime: it has {size} B, and this machine has 8 B of memory"
    ]
    assert "optimizations" not in built.facts


def test_check_names_what_it_does_not_run(parse: Any) -> None:
    graph = parse(RELU)
    graph.nodes[0].domain = "my.domain"
    profile, operator = TARGET.check(graph, BuildRequest([{"m": Range(1, 1, 1), "n": Range(1, 1, 1)}]))
    assert profile == "profile: no input has a dimension 'm'; known: n"
    assert "my.domain" in operator
    assert "Relu" in operator


def test_a_model_that_does_not_load_is_a_target_error(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"no model")
    with pytest.raises(TargetError, match=r"ONNX Runtime cannot load model\.onnx: "):
        TARGET.build(model, tmp_path, REQUEST, lambda _: None)
