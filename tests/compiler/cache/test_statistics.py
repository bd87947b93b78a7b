"""Statistics of calibration as entries of their own: other choices of quantization find them, damage is noticed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler import compile as run_compile
from llmc.compiler.cache import place
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.recipe import Recipe

from .conftest import content, write_model


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Each time that calibration goes through its data, the tensors that it looks at."""
    seen: list[list[str]] = []
    run = SampledActivations._run

    def counted(self: SampledActivations, graph: Any, tensors: Any, samples: Any) -> Iterator[Any]:
        seen.append(list(tensors))
        return run(self, graph, tensors, samples)

    monkeypatch.setattr(SampledActivations, "_run", counted)
    return seen


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The model, whose recipe has one pass that calibrates."""
    path = write_model(tmp_path / "model")
    recipe = path.with_name("recipe.yaml")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("convert-fp16, ", ""), encoding="utf-8")
    return path


def compiled(model: Path, output: Path, *settings: str, cached: bool = True) -> dict[str, Any]:
    recipe = Recipe.load(model.with_name("recipe.yaml")).with_settings(settings)
    run_compile(str(model), recipe, output, cached=cached, force=True)
    return content(output)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["passes.quantize-int8.exclude=[q]"], 0),
        (["passes.quantize-int8.correct_bias=false"], 0),
        (["passes.quantize-int8.correct_bias=false", "passes.quantize-int8.calibration.method=entropy"], 0),
        (["passes.quantize-int8.calibration.method=minmax"], 1),  # what rounding to other scales costs
        (["passes.quantize-int8.calibration.samples=2"], 2),
        (["verify.seed=1"], 2),  # of the generated samples, which calibrate here
    ],
)
def test_the_data_is_gone_through_for_what_is_not_known(
    settings: list[str], expected: int, model: Path, tmp_path: Path, rounds: list[list[str]]
) -> None:
    compiled(model, tmp_path / "first")
    assert len(rounds) == 2, "activations, and what each product loses"
    rounds.clear()
    second = compiled(model, tmp_path / "second", *settings)
    assert len(rounds) == expected
    assert second == compiled(model, tmp_path / "without", *settings, cached=False)


def test_what_is_missing_is_measured_alone(model: Path, tmp_path: Path, rounds: list[list[str]]) -> None:
    compiled(model, tmp_path / "first", "passes.quantize-int8.exclude=[q]")
    assert rounds == [["x"], ["x"]], "what it reaches, and what the product of it loses"
    rounds.clear()
    second = compiled(model, tmp_path / "second")
    assert rounds == [["g"], ["g"]]
    assert second == compiled(model, tmp_path / "without", cached=False)


def test_another_graph_shares_nothing(model: Path, tmp_path: Path, rounds: list[list[str]]) -> None:
    compiled(model, tmp_path / "first")
    rounds.clear()
    recipe = model.with_name("recipe.yaml")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("fuse-gelu, ", ""), encoding="utf-8")
    compiled(model, tmp_path / "second")
    assert len(rounds) == 2


def test_one_byte_of_any_entry_that_changes_is_noticed(
    model: Path, tmp_path: Path, rounds: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Each record and each blob in turn: dropped with a warning, measured again, and the result is right."""
    expected = compiled(model, tmp_path / "first")
    records = sorted((place() / "v1/records/statistics").glob("*/*"))
    assert len(records) >= 4, "two activations, two products"
    blobs = [
        place() / "v1/blobs" / digest[:2] / digest
        for record in records
        for digest in json.loads(record.read_bytes().partition(b"\n")[2])["blobs"]
    ]
    assert len(set(blobs)) == len(records)
    for path in (*records, *blobs):
        for entry in (place() / "v1/records/pass").glob("*/*"):
            entry.unlink()  # else no pass would ask
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        caplog.clear()
        rounds.clear()
        with caplog.at_level(logging.WARNING, "llmc.cache"):
            assert compiled(model, tmp_path / "again") == expected
        assert [str(path) in message for message in caplog.messages] == [True]
        assert len(rounds) == 1, "what was damaged is measured again, and nothing else"
        assert path.read_bytes() == whole
