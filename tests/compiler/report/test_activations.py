"""What a compile reports of quantized activations and scales, against NumPy on the same data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from llmc.compiler import compile as run_compile
from llmc.compiler.recipe import Recipe
from llmc.compiler.report import PassReport, Report, charts, json
from llmc.compiler.report.activations import quantized
from llmc.passes.graph import Array

MODEL = """<ir_version: 10, opset_import: ["": 20]>
g (float[batch,16] x) => (float[batch,16] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"""
RECIPE = """
model: {dimensions: {batch: [1, 2, 4]}}
passes: [{STEP: {correct_bias: false, calibration: {data: DATA, method: percentile, percentile: 90}}}]
target: {kind: onnx}
verify: {samples: 2, on_failure: warn}
"""
LARGEST = {"quantize-int8": 127, "quantize-fp8": 448}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Array]]:
    """A folder with a model and data for it, and the values of weights and activations."""
    folder, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(3)
    values = {name: rng.standard_normal((16, 16)).astype(np.float32) for name in ("w", "v")}
    model = onnx.parser.parse_model(MODEL)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(weight, name) for name, weight in values.items())
    onnx.save(model, folder / "model.onnx")
    values["x"] = rng.standard_normal((200, 16)).astype(np.float32)
    values["x"][:, 3] = 0
    values["r"] = np.maximum(values["x"] @ values["w"], 0)
    (folder / "data").mkdir()
    for number, row in enumerate(values["x"]):
        np.savez(folder / "data" / f"{number:03}.npz", x=row[None])
    return folder, values


def compiled(folder: Path, output: Path, key: str, *settings: str) -> Report:
    recipe = folder / f"{key}.yaml"
    text = RECIPE.replace("STEP", key).replace("DATA", str(folder / "data"))
    recipe.write_text(text, encoding="utf-8")
    wanted = (f"passes.{key}.calibration.samples=200", *settings)
    return run_compile(str(folder / "model.onnx"), Recipe.load(recipe).with_settings(wanted), output)


@pytest.mark.parametrize("key", LARGEST)
def test_saturation_and_scales_are_what_numpy_counts(
    key: str, truth: tuple[Path, dict[str, Array]], tmp_path: Path
) -> None:
    folder, values = truth
    step = compiled(folder, tmp_path / "out", key).passes[1]
    assert [line.tensor for line in step.activations] == ["x", "r"]
    for line in step.activations:
        magnitudes = np.abs(values[line.tensor])
        # r is a sum that ONNX Runtime may round otherwise: no value lies so near to the clipping point
        assert np.abs(magnitudes - line.clip).min() > 1e-5
        assert line.saturated == np.count_nonzero(magnitudes > line.clip) / magnitudes.size > 0.05
        assert (line.values, line.zeros) == (magnitudes.size, np.count_nonzero(magnitudes == 0))
        assert line.amax == pytest.approx(magnitudes.max(), rel=1e-6)  # float32 sums of 16
        # a scale is rounded up to float16, 11 bits
        assert 1 <= line.scale * LARGEST[key] / line.clip <= 1 + 2**-10
        assert sum(line.counts) + line.zeros == line.values
    reach = [np.abs(values[name]).max(axis=0) / LARGEST[key] for name in ("w", "v")]
    expected = Counter(int(np.floor(np.log2(scale))) for scale in np.concatenate(reach))
    assert step.weight_scales == dict(sorted(expected.items()))


def without_times(report: Report) -> dict[str, Any]:
    return report.model_dump(exclude={"timings"})


def test_a_pass_from_the_cache_reports_the_same(truth: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    first, second = (compiled(truth[0], tmp_path / name, "quantize-int8") for name in ("first", "second"))
    assert "1 quantize-int8" in second.timings.cached
    assert without_times(first) == without_times(second)
    assert Report.model_validate_json(json.render(second)) == second


def test_without_data_the_scales_alone_are_known(truth: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    known = compiled(truth[0], tmp_path / "first", "quantize-int8").passes[1]
    file = tmp_path / "first" / "calibration.json"
    settings = ("passes.quantize-int8.calibration.data=null", f"passes.quantize-int8.calibration.statistics={file}")
    step = compiled(truth[0], tmp_path / "second", "quantize-int8", *settings).passes[1]
    assert [(line.tensor, line.scale, line.clip) for line in step.activations] == [
        (line.tensor, line.scale, line.clip) for line in known.activations
    ]
    assert [(line.saturated, line.counts) for line in step.activations] == [(None, [])] * 2


def test_a_pass_that_asks_for_less_quantizes_less(truth: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    step = compiled(truth[0], tmp_path / "out", "quantize-int8", "passes.quantize-int8.exclude=[first]").passes[1]
    assert len(step.activations) == 1


def test_the_page_has_a_line_at_the_clipping_point(report: Report) -> None:
    page = quantized(report.passes[1])
    assert page is not None
    assert page.count('x1="63.50%"') == 1  # 1.27 of four bins of 0.5
    assert page.count("<path") == 2 + 2  # in range and saturated, and the scales of weights and of activations
    assert quantized(PassReport(index=1, key="fuse-gelu")) is None


def test_weights_that_no_data_was_needed_for_are_on_the_page_too() -> None:
    step = PassReport(index=1, key="quantize-weights", clipped_weights={"w": 0.0125, "v": 0.0}, weight_scales={-7: 3})
    page = quantized(step)
    assert page is not None
    assert page.index("<code>w</code>") < page.index("1.2 %") < page.index("<code>v</code>")
    assert page.count("<path") == 1
    assert "Activations" not in page


def test_bars_are_as_high_as_logarithms() -> None:
    """log2(1 + n) of 0, 1, 3 and 15 is 0, 1, 2 and 4, where 4 takes 28 pixels; a bar with the clip is in range."""
    drawn = charts.histogram([15, 3, 1, 0], "t", 1.5)
    assert 'class="stayed"' in drawn
    assert 'd="M0 28V0h1V14h1V28z"' in drawn
    assert 'd="M2 28V21h1V28h1V28z"' in drawn
    assert 'x1="37.50%"' in drawn
    assert "clip" not in charts.histogram([15, 3], "t", 2.0), "nothing is clipped"
