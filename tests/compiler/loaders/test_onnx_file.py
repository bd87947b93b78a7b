"""ONNX files: weights stay on disk, and every broken file is told by its fault."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.onnx_file import load_onnx
from llmc.compiler.session import Session
from llmc.passes.graph import FileRegion, constants, shape_of

WEIGHT = np.arange(2048, dtype=np.float32).reshape(4, 512) / 2048


def write(path: Path, text: str, opset: str = '"": 20') -> Path:
    onnx.save(onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{opset}]> g {text}"), path)
    return path


def write_external(folder: Path, location: str, offset: int = 0) -> Path:
    """x [n,4] times a weight [4,512] that stands in another file."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=WEIGHT.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", WEIGHT.nbytes)):
        weight.external_data.add(key=key, value=str(value))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 512])],
        [weight],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def refused(path: Path, reason: str) -> None:
    with pytest.raises(LlmcError, match=reason) as caught:
        load_onnx(path)
    assert str(path) in str(caught.value), "the message names the file"
    assert "\n" not in str(caught.value)


def test_loads_what_the_file_says(tmp_path: Path) -> None:
    text = "(float[N,4] x) => (float[N,4] y) { y = Relu(x) }"
    loaded = load_onnx(write(tmp_path / "m.onnx", text), task="feature-extraction")
    assert [node.op for node in loaded.graph.nodes] == ["Relu"]
    assert (loaded.kind, loaded.name, loaded.exporter, loaded.reference) == ("onnx", "m.onnx", "", None)
    assert loaded.task == "feature-extraction"
    assert shape_of(loaded.graph.inputs[0]) == ("N", 4)


def test_external_data_stays_on_disk(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"\0" * 64 + WEIGHT.tobytes())
    loaded = load_onnx(write_external(tmp_path, "data/w.bin", offset=64))
    (constant,) = constants(loaded.graph)
    assert constant._values.source == FileRegion((tmp_path / "data" / "w.bin").resolve(), 64)
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(Session(loaded.graph).run({"x": x})["y"], x @ WEIGHT)


def test_digest_covers_external_data(tmp_path: Path) -> None:
    data = tmp_path / "w.bin"
    data.write_bytes(WEIGHT.tobytes())
    path = write_external(tmp_path, "w.bin")
    before = load_onnx(path).digest
    data.write_bytes(WEIGHT[::-1].tobytes())
    assert load_onnx(path).digest != before


def test_vocabulary_is_the_embedding_that_input_ids_index(tmp_path: Path) -> None:
    text = """(int64[B,S] input_ids) => (float[B,S,2] y)
        <float[3,2] table = {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}> { y = Gather(table, input_ids) }"""
    assert load_onnx(write(tmp_path / "m.onnx", text)).vocabulary == 3


def test_tokenizer_beside_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "(float[4] x) => (float[4] y) { y = Relu(x) }")
    assert load_onnx(path).tokenizer is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_onnx(path).tokenizer == tmp_path


def test_negative_size_means_unknown(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    onnx.save(model, path)
    assert shape_of(load_onnx(path).graph.inputs[0]) == (None, 4)


def test_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    whole = path.read_bytes()
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        refused(path, "truncated|it has no graph")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90405214\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"PK\x03\x04" + b"\0" * 100, "not an ONNX model"),
        (b"model weights, honest\n", "not an ONNX model"),
        (b"\x80\x02ctorch\n", "not an ONNX model"),
        (bytes(range(256)), "not an ONNX model"),
    ],
)
def test_not_an_onnx_model(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    refused(path, reason)


def test_damaged_bytes_are_never_a_traceback(tmp_path: Path) -> None:
    text = """(float[N,4] x) => (float[N,2] y)
        <float[4,2] w = {0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0}>
        { c = Constant<value = float[1] {2.0}>() a = Gemm<alpha=1.5>(x, w) y = Mul(a, c) }"""
    path = write(tmp_path / "m.onnx", text)
    whole = path.read_bytes()
    refusals = 0
    for position, byte in enumerate(whole):
        for damaged in (0, 0x7F, 0xFF, byte ^ 1):
            path.write_bytes(whole[:position] + bytes([damaged]) + whole[position + 1 :])
            try:
                load_onnx(path)
            except LlmcError:
                refusals += 1
    assert refusals > len(whole), "most damage shows"


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    refused(tmp_path / "m.onnx", "cannot be read: Permission denied")


@pytest.mark.parametrize("location", ["../w.bin", "link.bin", "sub/../../w.bin", "{absolute}"])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    path = write_external(folder, location.format(absolute=tmp_path / "w.bin"))
    refused(path, "outside|absolute|symbolic link")


def test_external_data_missing(tmp_path: Path) -> None:
    refused(write_external(tmp_path, "w.bin"), r"tensor 'w': external data file '.*w\.bin' is missing")


def test_external_data_too_short(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes()[:-1])
    refused(write_external(tmp_path, "w.bin"), "ends at byte 8191, the tensor needs bytes 0 to 8192")


@pytest.mark.parametrize("version", [1, 6, 27, 99])
def test_opset_out_of_range(tmp_path: Path, version: int) -> None:
    text = "(float[4] x) => (float[4] y) { y = Relu(x) }"
    refused(write(tmp_path / "m.onnx", text, f'"": {version}'), f"at opset {version}; llmc takes 7 to 26")


def test_opset_of_a_file_cannot_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "(float[4] x) => (float[4] y) { y = Relu(x) }")
    assert load_onnx(path, opset=20).graph.opset == 20
    with pytest.raises(LlmcError, match="is at opset 20: the opset 23 can be chosen only"):
        load_onnx(path, opset=23)


def test_no_import_of_the_onnx_domain(tmp_path: Path) -> None:
    text = "(float[4] x) => (float[4] y) { y = com.microsoft.Gelu(x) }"
    refused(write(tmp_path / "m.onnx", text, '"com.microsoft": 1'), r"does not import .* only: com\.microsoft")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[4] x) => (float[4] y) { y = NoSuchOperator(x) }", "No Op registered for NoSuchOperator"),
        ("(float[4] x) => (float[4] y) { y = Relu(z) }", "input 'z' of node.*is not output of any previous"),
        ("(float[4] x) => (float[4] y) { z = Relu(x) }", "output 'y' is not an output of any node"),
        (
            "(float[4] x) => (float[4] y) { y = Relu(x) y = Relu(x) }",
            "'y' has been used as output names multiple times",
        ),
    ],
)
def test_what_the_checker_finds(tmp_path: Path, text: str, reason: str) -> None:
    refused(write(tmp_path / "m.onnx", text), reason)


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "(float[4] x) => (float[4] y) { y = Relu(x) }")
    assert load_onnx(path).digest == hashlib.sha256(path.read_bytes()).hexdigest()
