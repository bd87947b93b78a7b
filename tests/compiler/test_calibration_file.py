"""`calibration.json`: what a compile writes, that another takes its scales from it, and who it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from llmc.compiler import compile as run_compile
from llmc.compiler.calibration_file import NAME
from llmc.compiler.errors import LlmcError
from llmc.compiler.recipe import Recipe
from llmc.compiler.report import Report
from llmc.compiler.session import Session
from llmc.passes.graph import from_model

MODEL = """<ir_version: 10, opset_import: ["": 20]>
g (float[batch,16] x) => (float[batch,16] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"""
RECIPE = """
model: {dimensions: {batch: [1, 2, 4]}}
passes: [{quantize-int8: {correct_bias: false, calibration: {data: data}}}]
target: {kind: onnx}
verify: {samples: 2, on_failure: warn}
"""
DATA, STATISTICS = "passes.quantize-int8.calibration.data", "passes.quantize-int8.calibration.statistics"


def write_model(path: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    model = onnx.parser.parse_model(MODEL)
    for name in ("w", "v"):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal((16, 16)).astype(np.float32), name)
        )
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    (tmp_path / "data").mkdir()
    for number in range(5):
        np.savez(tmp_path / "data" / f"{number}.npz", x=rng.standard_normal((1, 16)).astype(np.float32))
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return write_model(tmp_path / "model.onnx")


def compiled(model: Path, name: str, *settings: str, **options: Any) -> tuple[Path, Report]:
    output = model.with_name(name)
    recipe = Recipe.load(model.parent / "recipe.yaml").with_settings(settings)
    return output, run_compile(str(model), recipe, output, **options)


def known(artifact: Path, data: str = "null") -> tuple[str, str]:
    """Settings: scales from an artifact's statistics."""
    return f"{DATA}={data}", f"{STATISTICS}={artifact / NAME}"


def tensors(artifact: Path) -> Any:
    return json.loads((artifact / NAME).read_bytes())["passes"][0]["tensors"]


def test_it_says_what_the_tensors_look_like_one_a_line(model: Path) -> None:
    artifact, _ = compiled(model, "first", "passes.quantize-int8.calibration.method=minmax")
    graph = from_model(onnx.load(model))
    feeds = [dict(np.load(file)) for file in sorted((model.parent / "data").iterdir())]
    peaks = {
        "x": max(float(np.abs(sample["x"]).max()) for sample in feeds),
        "r": max(float(np.abs(Session(graph, ["r"]).run(sample, ["r"])["r"]).max()) for sample in feeds),
    }
    assert tensors(artifact) == {
        name: {"method": "minmax", "percentile": 100.0, "samples": 5, "amax": peak, "clip": peak}
        for name, peak in peaks.items()
    }
    lines = [line.strip() for line in (artifact / NAME).read_text(encoding="utf-8").splitlines()]
    assert [line.split(":")[0] for line in lines if "amax" in line] == ['"r"', '"x"']


def test_scales_from_it_are_the_same_and_no_data_is_run(model: Path) -> None:
    first, _ = compiled(model, "first")
    for file in (model.parent / "data").iterdir():
        file.unlink()
    (model.parent / "data").rmdir()
    second, report = compiled(model, "second", *known(first))
    for name in (NAME, "model.onnx"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert report.passes[1].warnings == [], "random inputs would be warned of"


def test_a_pass_from_the_cache_writes_it_too(model: Path) -> None:
    first, _ = compiled(model, "first")
    second, report = compiled(model, "second")
    assert "1 quantize-int8" in report.timings.cached
    assert (second / NAME).read_bytes() == (first / NAME).read_bytes()


def test_a_changed_file_is_not_found_in_the_cache(model: Path) -> None:
    first, _ = compiled(model, "first")
    compiled(model, "second", *known(first))
    text = (first / NAME).read_text(encoding="utf-8")
    clip = tensors(first)["x"]["clip"]
    (first / NAME).write_text(text.replace(f'"clip": {clip}', '"clip": 0.25'), encoding="utf-8")
    third, report = compiled(model, "third", *known(first))
    assert "1 quantize-int8" not in report.timings.cached
    assert tensors(third)["x"]["clip"] == 0.25


def test_the_largest_magnitude_answers_minmax_whatever_was_asked(model: Path) -> None:
    minmax = "passes.quantize-int8.calibration.method=minmax"
    first, _ = compiled(model, "first", "passes.quantize-int8.calibration.method=percentile")
    plain, _ = compiled(model, "plain", minmax)
    again, _ = compiled(model, "again", minmax, *known(first))
    assert tensors(again) == tensors(plain)
    assert (again / "model.onnx").read_bytes() == (plain / "model.onnx").read_bytes()


def test_biases_need_data(model: Path) -> None:
    corrected = "passes.quantize-int8.correct_bias=true"
    first, _ = compiled(model, "first", corrected)
    without, report = compiled(model, "without", corrected, *known(first))
    assert report.passes[1].warnings == [
        "biases are not corrected: that needs calibration.data beside calibration.statistics"
    ]
    with_data, _ = compiled(model, "with", corrected, *known(first, str(model.parent / "data")))
    assert (with_data / "model.onnx").read_bytes() == (first / "model.onnx").read_bytes()
    assert (without / "model.onnx").read_bytes() != (first / "model.onnx").read_bytes()


def test_no_pass_that_asks_no_file(model: Path) -> None:
    artifact, _ = compiled(model, "plain", "passes=[fold-constants]")
    assert not (artifact / NAME).exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["passes.quantize-int8.calibration.method=entropy"], "calibrated with mse over 5 samples, quantize-int8 asks"),
        (["passes.quantize-int8.calibration.samples=4"], "calibrated with mse over 5 samples, quantize-int8 asks"),
    ],
)
def test_what_was_asked_otherwise_is_refused(settings: list[str], reason: str, model: Path) -> None:
    first, _ = compiled(model, "first")
    with pytest.raises(LlmcError, match=reason):
        compiled(model, "second", *settings, *known(first))


def test_a_tensor_that_it_lacks_is_named(model: Path) -> None:
    first, _ = compiled(model, "first")
    content = json.loads((first / NAME).read_bytes())
    del content["passes"][0]["tensors"]["r"]
    (first / NAME).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(LlmcError, match=r"calibration\.json has no statistics of r for quantize-int8"):
        compiled(model, "second", *known(first))
    assert not model.with_name("second").exists()


def test_another_model_is_refused(model: Path) -> None:
    first, _ = compiled(model, "first")
    write_model(model, seed=9)
    with pytest.raises(LlmcError, match=r"calibration\.json was made for another model: sha256 "):
        compiled(model, "second", *known(first))


def test_other_passes_before_are_refused(model: Path) -> None:
    first, _ = compiled(model, "first")
    text = RECIPE.replace("passes: [", "passes: [smooth-quant, ").replace("data: data", f"statistics: {first / NAME}")
    (model.parent / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(LlmcError, match="quantize-int8 were made after other passes"):
        compiled(model, "second")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"model": 1, "passes": []}', b"\xff"])
def test_what_is_no_such_file_is_refused(content: bytes, model: Path) -> None:
    broken = model.parent / NAME
    broken.write_bytes(content)
    with pytest.raises(LlmcError, match=r"is no calibration\.json of llmc"):
        compiled(model, "second", f"{STATISTICS}={broken}")


@pytest.mark.parametrize("method", ["moving-average", "moving_average"])
def test_a_moving_average_is_refused_with_the_reason(method: str, model: Path) -> None:
    recipe = Recipe.load(model.parent / "recipe.yaml")
    with pytest.raises(LlmcError, match="depends on the order of the samples"):
        recipe.with_settings([f"passes.quantize-int8.calibration.method={method}"])
