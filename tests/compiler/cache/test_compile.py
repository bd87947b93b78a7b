"""Compiles with a cache: what is found, what is done anew, and that the result is the same."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler import compile as run_compile
from llmc.compiler.artifact import check_artifact
from llmc.compiler.cache import place
from llmc.compiler.errors import LlmcError
from llmc.compiler.recipe import Recipe
from llmc.compiler.targets import availability

from .conftest import content, timings, write_model

STEPS = ["1 fold-constants", "2 eliminate-identity", "3 fuse-gelu", "4 quantize-int8", "5 convert-fp16"]
ALL = [*STEPS, "6 eliminate-dead", "build"]
KINDS = ("build", "numerics", "outputs", "pass", "regions", "statistics")


def compiled(model: Path, output: Path, *settings: str, **options: Any) -> Path:
    recipe = Recipe.load(model.with_name("recipe.yaml")).with_settings(settings)
    run_compile(str(model), recipe, output, **options)
    return output


def cached(artifact: Path) -> list[str]:
    found: list[str] = timings(artifact)["cached"]
    return found


def test_an_unchanged_compile_does_nothing_again_and_says_so(model: Path, tmp_path: Path) -> None:
    first = compiled(model, tmp_path / "first")
    second = compiled(model, tmp_path / "second")
    without = compiled(model, tmp_path / "without", cached=False)
    assert (cached(first), cached(second), cached(without)) == ([], ALL, [])
    assert content(first) == content(second) == content(without)
    assert len(check_artifact(second)) == 7


def test_an_unchanged_compile_imports_nothing_heavy(model: Path, tmp_path: Path) -> None:
    compiled(model, tmp_path / "first")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from llmc.compiler import compile\n"
        "compile(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))\n"
        "print(*{'torch', 'transformers', 'onnxruntime', 'tensorrt_rtx', 'polygraphy'} & set(sys.modules))"
    )
    words = [str(model), str(model.with_name("recipe.yaml")), str(tmp_path / "second")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert cached(tmp_path / "second") == ALL


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ("passes.fuse-gelu=null", ALL),  # the same, spelled out
        ("passes.quantize-int8.calibration.method=minmax", STEPS[:3]),
        ("passes.quantize-int8.calibration.samples=2", STEPS[:3]),
        ("verify.seed=1", STEPS[:3]),  # of the generated samples, which calibrate here
        ("target.kind=onnxruntime", ALL[:-1]),
        ("verify.budgets.cosine=0.8", ALL),
    ],
)
def test_what_a_change_does_not_touch_is_kept(setting: str, kept: list[str], model: Path, tmp_path: Path) -> None:
    compiled(model, tmp_path / "first")
    second = compiled(model, tmp_path / "second", setting)
    found = cached(second)
    assert found[: len(kept)] == kept
    assert not set(ALL[len(kept) : len(kept) + 1]) & set(found)
    assert content(second) == content(compiled(model, tmp_path / "without", setting, cached=False))


def test_another_model_of_the_same_name_shares_nothing(model: Path, tmp_path: Path) -> None:
    first = compiled(model, tmp_path / "first")
    write_model(model.parent, seed=1)
    second = compiled(model, tmp_path / "second")
    assert cached(second) == []
    assert content(first)["model.onnx"] != content(second)["model.onnx"]


@pytest.mark.parametrize("last", [0, 1, 2, 3, 4])
def test_stopping_after_a_rewrite_uses_what_was_done_before_it(last: int, model: Path, tmp_path: Path) -> None:
    compiled(model, tmp_path / "first")
    second = compiled(model, tmp_path / "second", stop_after_rewrite=last)
    assert content(second) == content(compiled(model, tmp_path / "without", stop_after_rewrite=last, cached=False))
    assert "1 fold-constants" in cached(second)
    third = compiled(model, tmp_path / "third")  # nothing of the shortened run passes for the whole
    assert cached(third) == ALL
    assert content(third) == content(tmp_path / "first")


def entries() -> list[Path]:
    return sorted(path for path in place().rglob("*") if path.is_file() and path.name != "lock")


def test_one_byte_of_any_cached_file_that_changes_is_noticed(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each entry in turn: dropped with a warning, made anew, and the result is right."""
    expected = content(compiled(model, tmp_path / "first"))
    compiled(model, tmp_path / "first")
    kinds = set()
    for path in entries():
        for numerics in (place() / "v1/records/numerics").glob("*/*"):
            if path.parts[-3] != "numerics":
                numerics.unlink()  # else nothing would need what the reference gives
        if path.parts[-3] == "statistics":
            for entry in (place() / "v1/records/pass").glob("*/*"):
                entry.unlink()  # else no pass would ask for statistics
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "llmc.cache"):
            assert content(compiled(model, tmp_path / "again")) == expected
        if path.read_bytes() != whole:  # a blob that this compile had no need to read
            assert "blobs" in path.parts
            path.write_bytes(whole)
            continue
        assert len(caplog.messages) == 1
        assert str(path) in caplog.messages[0]
        kinds.add(path.parts[path.parts.index("v1") + 1 : -2])
    assert kinds == {("blobs",), *(("records", kind) for kind in KINDS)}
    assert cached(compiled(model, tmp_path / "last")) == ALL


@pytest.mark.parametrize(
    "target",
    ["onnx", "onnxruntime", pytest.param("tensorrt-rtx", marks=pytest.mark.slow)],
)
def test_one_byte_of_any_file_of_an_artifact_that_changes_is_noticed(target: str, model: Path, tmp_path: Path) -> None:
    if any(entry.kind == target and entry.missing for entry in availability()):
        pytest.skip(f"{target} cannot build here")
    artifact = compiled(model, tmp_path / "out", f"target.kind={target}")
    names = check_artifact(artifact)
    assert sorted(names) == sorted(path.name for path in artifact.iterdir())
    assert {"manifest.json", "model.onnx", "recipe.yaml", "report.html", "report.json", "report.md"} <= set(names)
    assert ("model.engine" in names) == (target == "tensorrt-rtx")
    for name in names:
        whole = (artifact / name).read_bytes()
        for byte in {0, len(whole) // 2, len(whole) - 1}:
            (artifact / name).write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])
            with pytest.raises(LlmcError, match=rf"{name} is not as it was written|is no artifact of llmc"):
                check_artifact(artifact)
        (artifact / name).write_bytes(whole)
    assert check_artifact(artifact) == names


def test_a_cache_that_is_gone_or_empty_is_made_anew(model: Path, tmp_path: Path) -> None:
    expected = content(compiled(model, tmp_path / "first"))
    for path in entries():
        path.unlink()
    assert content(compiled(model, tmp_path / "second")) == expected
    for path in entries():
        path.write_bytes(b"")
    assert content(compiled(model, tmp_path / "third")) == expected


def test_a_cache_that_cannot_be_written_is_said_once_and_does_no_harm(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = content(compiled(model, tmp_path / "first", cached=False))
    for name, value, said in (
        ("LLMC_CACHE", "/proc/llmc", "the cache at /proc/llmc/v1 is not used: "),
        ("LLMC_CACHE_LIMIT", "5KB", "more than the limit of 5,000 bytes (LLMC_CACHE_LIMIT)"),
    ):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "llmc.cache"):
            patch.setenv(name, value)
            caplog.clear()
            assert content(compiled(model, tmp_path / "second")) == expected
        assert len(caplog.messages) == 1
        assert said in caplog.messages[0]


def test_the_cache_is_cut_to_its_limit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE_LIMIT", "60KB")
    for seed in range(4):
        write_model(model.parent, seed)
        compiled(model, tmp_path / "out")
        assert 1000 < sum(path.stat().st_size for path in entries()) <= 60_000
    assert cached(compiled(model, tmp_path / "out"))


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    """A Hugging Face folder."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


BERT = {"model.dimensions": {"batch": 2, "sequence": 8}, "verify.samples": 2}
DATA = """
import numpy as np


def samples():
    for seed in range(2):
        ids = np.random.default_rng(seed).integers(0, 64, (2, 8))
        yield {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
"""


@pytest.mark.slow
def test_one_byte_of_an_export_an_engine_or_of_what_is_known_of_samples_that_changes_is_noticed(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (entry,) = [entry for entry in availability() if entry.kind == "tensorrt-rtx"]
    if entry.missing:
        pytest.skip("tensorrt-rtx cannot build here")
    (tmp_path / "data.py").write_text(DATA, encoding="utf-8")
    data = f"{tmp_path / 'data.py'}:samples"
    values = {
        **BERT,
        "target.kind": "tensorrt-rtx",
        "target.compute_capabilities": [86],
        "verify.inputs": data,
    }
    recipe = Recipe.load("optimize").with_values(values)

    def artifact() -> dict[str, Any]:
        run_compile(str(tiny_bert), recipe, tmp_path / "out", force=True)
        return content(tmp_path / "out")

    expected = artifact()
    records = [path for path in entries() if {"load", "build", "samples"} & set(path.parts)]
    blobs = {
        place() / "v1/blobs" / blob[:2] / blob
        for path in records
        for blob in json.loads(path.read_bytes().partition(b"\n")[2])["blobs"]
    }
    assert {path.parts[-3] for path in records} == {"load", "build", "samples"}
    noticed = set()
    for path in (*records, *sorted(blobs)):
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "llmc.cache"):
            assert artifact() == expected
        if path.read_bytes() == whole:
            assert any(str(path) in message for message in caplog.messages)
            noticed.add(path)
        path.write_bytes(whole)
    assert noticed >= set(records)
    assert noticed & blobs


@pytest.mark.slow
def test_a_hugging_face_model_is_exported_once(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tiny_bert
    recipe = Recipe.load("optimize").with_values({**BERT, "target.kind": "onnx"})
    run_compile(str(folder), recipe, tmp_path / "first")
    run_compile(str(folder), recipe, tmp_path / "second")
    assert cached(tmp_path / "first") == []
    assert cached(tmp_path / "second") == ["load", *timings(tmp_path / "first")["steps"]][:1] + [
        step for step in timings(tmp_path / "first")["steps"] if step not in ("load", "verify")
    ]
    assert content(tmp_path / "first") == content(tmp_path / "second")
    more = recipe.with_values({"verify.seed": 1})  # the graph is known, what torch gives for these samples is not
    run_compile(str(folder), more, tmp_path / "third")
    assert "load" in cached(tmp_path / "third")
    run_compile(str(folder), more, tmp_path / "fourth", cached=False)
    assert content(tmp_path / "third") == content(tmp_path / "fourth")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("gelu", "relu"))
    run_compile(str(folder), recipe, tmp_path / "fifth")
    assert cached(tmp_path / "fifth") == []
