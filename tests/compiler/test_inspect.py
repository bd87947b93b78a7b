"""`llmc inspect`: whatever a file is, one report of it or one clear line."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llmc.compiler.errors import LlmcError
from llmc.compiler.inspect import inspect, render
from llmc.compiler.report import EngineReport, GraphReport, ModelReport, Report, SourceReport, Timings, write
from llmc.passes.graph import Constant, Graph, save_model

CAPABILITIES_80_89 = 0x02 | 0x08


@pytest.fixture
def model(parse: Callable[..., Graph], tmp_path: Path) -> Path:
    graph = parse("(float16[batch,5] x, float16[5,6] w) => (float16[batch,6] y) { y = MatMul(x, w) }")
    graph.nodes[0].inputs[1] = Constant("w", np.ones((5, 6), np.float16))
    graph.inputs = graph.inputs[:1]
    path = tmp_path / "model.onnx"
    save_model(graph, path)
    return path


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    report = Report(
        llmc="0.1.0",
        status="done",
        source=SourceReport(kind="onnx", name="m.onnx", sha256="0" * 64),
        recipe="fp16",
        passes=[],
        graph=GraphReport(opset=20, nodes={}, inputs=[], outputs=[], weights={}, flops=None),
        versions={},
        timings=Timings(total=1.0, steps={}),
    )
    write(report, folder)
    (folder / "manifest.json").write_text(json.dumps({"llmc": "0.1.0"}))
    return folder


def engine(path: Path, size: int = 100) -> Path:
    header = struct.pack("<4s12xQ4B4sQ16xQ", b"vtrt", size, 1, 7, 1, 116, b"vtrt", CAPABILITIES_80_89, 45)
    path.write_bytes(header.ljust(100, b"\0"))
    return path


@pytest.mark.parametrize("folder", [False, True])
def test_a_model(folder: bool, model: Path) -> None:
    found = inspect(model.parent if folder else model, {"batch": 4})
    assert isinstance(found, ModelReport)
    assert (found.file, found.graph.flops, found.graph.sizes) == ("model.onnx", 2 * 4 * 5 * 6, {"batch": 4})
    assert [(layer.op, layer.found) for layer in found.precision] == [("MatMul", "float16")]
    assert found.graph.weights["float16"].bytes == 2 * 5 * 6


@pytest.mark.parametrize("name", ["model.engine", "model.bin"])
def test_an_engine_by_its_name_or_its_bytes(name: str, tmp_path: Path) -> None:
    found = inspect(engine(tmp_path / name))
    assert isinstance(found, EngineReport)
    assert (found.file, found.bytes) == (name, 100)
    assert (found.header["version"], found.header["compute_capabilities"]) == ("1.7.1.116", (80, 89))


def test_an_artifact(artifact: Path) -> None:
    found = inspect(artifact)
    assert isinstance(found, Report)
    assert found.recipe == "fp16"


def test_every_report_can_be_given_to_a_program(artifact: Path, model: Path, tmp_path: Path) -> None:
    for path in (artifact, model, engine(tmp_path / "model.engine")):
        found = inspect(path)
        again = type(found).model_validate_json(found.model_dump_json())
        assert again.model_dump(mode="json") == found.model_dump(mode="json")


def test_every_kind_is_printed(artifact: Path, model: Path, tmp_path: Path) -> None:
    printed = []
    for path in (artifact, model, engine(tmp_path / "model.engine")):
        out = io.StringIO()
        render(inspect(path), Console(file=out, width=100))
        printed.append(" ".join(out.getvalue().split()))
    assert "m.onnx fp16 ✓ done" in printed[0]
    assert "FLOPs unknown without sizes of batch" in printed[1]
    assert "compute capabilities 80, 89" in printed[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.onnx", None, "does not exist"),
        ("empty.onnx", b"", "is empty"),
        ("text.onnx", b"\xff\xfe\xfd" * 100, "is not an ONNX model"),
        ("short.engine", b"vtrt", "is no TensorRT-RTX engine"),
        ("other.plan", b"ftrt" + bytes(100), "is no TensorRT-RTX engine"),
    ],
)
def test_what_is_neither(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LlmcError, match=message):
        inspect(path)


def test_an_engine_cut_short(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="is no whole engine"):
        inspect(engine(tmp_path / "model.engine", size=200))


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"is no artifact of llmc, and holds no model\.onnx"):
        inspect(tmp_path)


def test_an_artifact_whose_report_is_gone(artifact: Path) -> None:
    (artifact / "report.json").unlink()
    with pytest.raises(LlmcError, match=r"report\.json cannot be read: No such file"):
        inspect(artifact)


def test_an_artifact_of_another_version(artifact: Path) -> None:
    path = artifact / "report.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(LlmcError, match=r"is no report of this version of llmc: schema_version: Input should be 1"):
        inspect(artifact)
