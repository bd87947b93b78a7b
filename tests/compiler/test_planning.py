"""Which samples a pass calibrates on, and which it judges what it does on: never the same; which budgets hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from llmc.compiler.planning import Plan, plan
from llmc.compiler.recipe import Recipe

MODEL = """<ir_version: 10, opset_import: ["": 20]>
g (float[batch,4] x) => (float[batch,4] y) <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}> { y = MatMul(x, w) }"""
KEY = "search-precision"


def planned(folder: Path, passes: str) -> Plan:
    onnx.save(onnx.parser.parse_model(MODEL), folder / "model.onnx")
    for name, count in (("data", 12), ("others", 5)):
        (folder / name).mkdir()
        for number in range(count):
            np.savez(folder / name / f"{number:02d}.npz", x=np.full((1, 4), number, np.float32))
    text = f"model: {{dimensions: {{batch: [1, 1, 1]}}}}\npasses: {passes}\ntarget: {{kind: onnx}}\n"
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return plan(str(folder / "model.onnx"), Recipe.load(folder / "recipe.yaml"))


def numbers(samples: object) -> list[int]:
    return [int(sample["x"][0, 0]) for sample in samples]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("calibrate", "judge", "calibrated", "judged"),
    [(4, 3, range(4), range(4, 7)), (8, 4, range(8), range(8, 12)), (128, 64, range(8), range(8, 12))],
    ids=["more than enough", "just enough", "too few: both get their share"],
)
def test_what_follows_the_calibration_samples_is_judged_on(
    tmp_path: Path, calibrate: int, judge: int, calibrated: range, judged: range
) -> None:
    made = planned(
        tmp_path, f"[{KEY}: {{calibration: {{data: data, samples: {calibrate}}}, judge: {{samples: {judge}}}}}]"
    )
    activations = made.activations(made.recipe.passes[0])
    assert numbers(activations.samples) == [*calibrated]
    assert activations.held_out is not None
    assert numbers(activations.held_out.samples) == [*judged]
    assert not made.warnings


def test_judged_on_data_of_its_own(tmp_path: Path) -> None:
    made = planned(tmp_path, f"[{KEY}: {{calibration: {{data: data}}, judge: {{data: others, samples: 3}}}}]")
    activations = made.activations(made.recipe.passes[0])
    assert numbers(activations.samples) == [*range(12)]
    assert activations.held_out is not None
    assert numbers(activations.held_out.samples) == [0, 1, 2]
    assert not made.warnings
    assert made.about()["judging"] == {KEY: {"name": "others", "sha256": made.judging[KEY].digest}}


def test_a_pass_that_judges_nothing_has_all_samples(tmp_path: Path) -> None:
    made = planned(tmp_path, "[quantize-int8: {calibration: {data: data}}]")
    activations = made.activations(made.recipe.passes[0])
    assert (numbers(activations.samples), activations.held_out) == ([*range(12)], None)


@pytest.mark.parametrize(
    ("passes", "warning"),
    [
        (
            f"[smooth-quant: {{calibration: {{data: data}}}}, {KEY}: {{calibration: {{data: data}}}}]",
            f"{KEY} judges on samples of data that smooth-quant calibrates on, which flatters it: name others in "
            "judge.data, or let smooth-quant take 6 (calibration.samples)",
        ),
        (
            f"[{KEY}: {{calibration: {{data: data}}, judge: {{data: data}}}}]",
            f"{KEY} judges on samples of data that {KEY} calibrates on, which flatters it: name others in judge.data",
        ),
        (f"[smooth-quant: {{calibration: {{data: data, samples: 6}}}}, {KEY}: {{calibration: {{data: data}}}}]", ""),
        (f"[smooth-quant: {{calibration: {{data: others}}}}, {KEY}: {{calibration: {{data: data}}}}]", ""),
        (f"[{KEY}: {{calibration: {{data: data}}}}, smooth-quant: {{calibration: {{data: data}}}}]", ""),
        (f"[{KEY}]", ""),
    ],
    ids=["a pass before", "itself", "the same samples", "other data", "a pass after", "random inputs"],
)
def test_who_judges_on_what_calibrated_is_told(tmp_path: Path, passes: str, warning: str) -> None:
    found = [line for line in planned(tmp_path, passes).warnings if "flatters" in line]
    assert found == ([warning] if warning else [])


@pytest.mark.parametrize(("dtype", "limits"), [("float", {"relative_l2": 1e-4}), ("float16", {"relative_l2": 5e-2})])
def test_budgets_of_a_model_in_half_precision(tmp_path: Path, dtype: str, limits: dict[str, float]) -> None:
    onnx.save(onnx.parser.parse_model(MODEL.replace("float[", f"{dtype}[")), tmp_path / "model.onnx")
    made = plan(str(tmp_path / "model.onnx"), Recipe.load("optimize").with_values({"target.kind": "onnx"}))
    assert made.recipe.verify.limits() == limits
