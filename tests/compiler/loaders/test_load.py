"""`load` picks the loader, and says why where there is none."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import onnx.parser
import pytest

from llmc.compiler.digest import SourceFiles, digest_files
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import HUB_ID, load

MODEL = '<ir_version: 10, opset_import: ["": 20]> g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), path)
    return path


def test_onnx_file_and_its_folder_are_the_same_source(model: Path) -> None:
    by_file, by_folder = load(str(model)), load(str(model.parent))
    assert by_file.kind == by_folder.kind == "onnx"
    assert by_file.digest == by_folder.digest == hashlib.sha256(model.read_bytes()).hexdigest()


def test_suffix_of_an_onnx_file_does_not_matter(model: Path) -> None:
    assert load(str(model.rename(model.with_suffix(".model")))).name == "model.model"


def test_folder_with_checkpoint_and_model_onnx_is_the_checkpoint(model: Path) -> None:
    (model.parent / "config.json").write_text("{}")
    assert load(str(model.parent)).kind == "onnx"
    (model.parent / "model.safetensors").write_bytes(b"")
    with pytest.raises(LlmcError, match=r"model\.safetensors is truncated"):
        load(str(model.parent))


@pytest.mark.parametrize("source", ["nowhere/at/all", "./model", "/no/such/folder", "gone.onnx", "~/none/x", "a.pt"])
def test_missing_source(source: str) -> None:
    with pytest.raises(LlmcError, match="does not exist"):
        load(source)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", "pickle"),
        ("model.pt", "pickle"),
        ("model.ckpt", "pickle"),
        ("adapter.safetensors", "holds weights only"),
        ("model.gguf", "quantized for llama.cpp"),
        ("model.engine", "TensorRT engine already"),
        ("model.tflite", "TensorFlow"),
        ("model.ort", "ONNX Runtime's own format"),
    ],
)
def test_file_of_another_kind(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(b"\x00" * 64)
    with pytest.raises(LlmcError, match=reason):
        load(str(tmp_path / name))


def test_weights_file_stands_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LlmcError, match=r"config\.json is not a JSON object"):
        load(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "holds no model"),
        (["a.onnx", "b.onnx"], r"no model\.onnx; give one of its files: a\.onnx, b\.onnx"),
        (["pytorch_model.bin"], "pickle"),
        (["llama.gguf"], "llama.cpp"),
    ],
)
def test_folder_without_a_model(tmp_path: Path, files: list[str], reason: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(LlmcError, match=reason):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "Qwen/Qwen2.5-0.5B", "owner/name@main", "a/b@refs/pr/1"])
def test_hub_names(name: str) -> None:
    assert HUB_ID.fullmatch(name)


@pytest.mark.parametrize("name", ["./gpt2", "../x", "/a/b", "~/a", "a/b/c", ""])
def test_paths_are_not_hub_names(name: str) -> None:
    assert not HUB_ID.fullmatch(name)


def test_digest_of_several_files_is_that_of_sha256sum(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text(name * 3)
    lines = subprocess.run(["sha256sum", "a", "b"], cwd=tmp_path, capture_output=True, check=True).stdout
    assert digest_files({name: tmp_path / name for name in ("b", "a")}) == hashlib.sha256(lines).hexdigest()


def test_a_file_of_a_source_is_read_once(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text(name * 3)
    said: list[str] = []
    read = SourceFiles(said.append)
    both = {name: tmp_path / name for name in ("b", "a")}
    first = read.digest(both)
    for path in both.values():
        path.write_text("something else")
    assert said == ["reading the model's files"]
    assert read.digest(both) == first
    assert read.digest({"b": tmp_path / "b"}) == hashlib.sha256(b"bbb").hexdigest()
    assert said == ["reading the model's files"]


def test_onnx_needs_neither_torch_nor_transformers(model: Path) -> None:
    code = f"import sys; from llmc.compiler.loaders import load; load({str(model)!r}); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
