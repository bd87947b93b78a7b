"""ONNX Runtime as a target: no file of its own, and the truth about whether it takes the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.errors import TargetError
from llmc.compiler.targets import BuildRequest, Range
from llmc.compiler.targets.onnxruntime import OnnxRuntime
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
