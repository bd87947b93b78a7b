"""Weights that stay in the source's files: who reads them, and that nobody ever writes or removes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import save_file

from llmc.compiler.artifact import check_artifact
from llmc.compiler.digest import sha256
from llmc.compiler.driver import compile as run_compile
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import load
from llmc.compiler.recipe import Recipe
from llmc.compiler.report import Report
from llmc.compiler.targets import availability
from llmc.passes.graph import (
    Constant,
    Derived,
    FileRegion,
    Graph,
    Node,
    Variable,
    Weights,
    constants,
    load_model,
    load_values,
    save_model,
)

from .conftest import SIDE, WEIGHTS, Mounted, llmc, recipe

LINK = "model.onnx.linked.model.onnx.data"
F32 = onnx.TensorProto.FLOAT


def compiled(model: Path, output: Path, name: str = "same", target: str = "onnxruntime", link: bool = True) -> Report:
    return run_compile(str(model), asked(model, name, target, link), output, cached=False)


def asked(model: Path, name: str = "same", target: str = "onnxruntime", link: bool = True) -> Recipe:
    values = {"target.kind": target, "target.link_weights": link}
    return Recipe.load(recipe(model, name)).with_values(values, "test")


def answer(artifact: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    x = np.linspace(-1, 1, SIDE, dtype=np.float32)[None]
    return np.asarray(session.run(None, {"y0": x})[0])


def test_nothing_is_copied_and_onnx_runtime_computes_the_same(model: Path, tmp_path: Path) -> None:
    data = model.with_name("model.onnx.data")
    before = sha256(data)
    report = compiled(model, tmp_path / "linked")
    compiled(model, tmp_path / "copied", link=False)
    assert sorted(path.name for path in (tmp_path / "linked").glob("model*")) == ["model.onnx", LINK]
    assert report.target is not None
    assert report.target.files[LINK] == data.stat().st_size
    assert (tmp_path / "linked" / LINK).samefile(data)
    assert sha256(data) == before
    assert np.array_equal(answer(tmp_path / "linked"), answer(tmp_path / "copied"))
    check_artifact(tmp_path / "linked")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_source_is_whole_whatever_becomes_of_the_artifact(model: Path, tmp_path: Path) -> None:
    data, output = model.with_name("model.onnx.data"), tmp_path / "out"
    before = sha256(data)
    compiled(model, output)
    compiled(model, output)  # in its place: the old names go
    assert data.stat().st_nlink == 2
    run_compile(str(output / "model.onnx"), asked(model), output, cached=False)  # what it is made of goes away
    assert data.stat().st_nlink == 2
    assert sha256(data) == before
    compiled(model, output, name="half", link=False)
    assert data.stat().st_nlink == 1
    compiled(model, output)
    shutil.rmtree(output)
    assert sha256(data) == before


def test_a_source_that_changes_is_noticed(model: Path, tmp_path: Path) -> None:
    compiled(model, tmp_path / "out")
    with model.with_name("model.onnx.data").open("r+b") as file:
        file.write(b"other")
    with pytest.raises(LlmcError, match=f"{LINK} is not as it was written"):
        check_artifact(tmp_path / "out")


def test_what_passes_changed_is_written(model: Path, tmp_path: Path) -> None:
    compiled(model, tmp_path / "out", name="half")
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "out/model.onnx.data").stat().st_size == WEIGHTS // 2


def test_another_disk_is_refused_before_anything_runs(model: Path, mounted: Mounted) -> None:
    root = mounted(32)
    words = ("--link-weights", "--target", "onnxruntime", "-o", root / "out")
    ended = llmc("compile", model, "--recipe", recipe(model, "same"), *words)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: {model}.data cannot be linked beside {root}/out: Invalid cross-device link; leave --link-weights "
        "(target.link_weights) out, and they are copied\n"
    )
    assert list(root.iterdir()) == []


def test_the_onnx_package_refuses_hard_links_and_so_does_its_target(model: Path, tmp_path: Path) -> None:
    """The reason is held against the package: should it ever take them, so should the target."""
    with pytest.raises(LlmcError, match=r"target onnx takes no hard link to .*model\.onnx\.data: the onnx package"):
        compiled(model, tmp_path / "out", target="onnx")
    compiled(model, tmp_path / "out")
    for path in (tmp_path / "out/model.onnx", model):
        with pytest.raises(onnx.checker.ValidationError, match="hard link"):
            onnx.checker.check_model(path)
        load(str(path))


@pytest.mark.parametrize("mounted", ["btrfs", "xfs"], indirect=True)
def test_where_blocks_can_be_shared_links_are_files_of_their_own(model: Path, mounted: Mounted) -> None:
    root = mounted(160)
    moved = Path(shutil.copytree(model.parent, root / "source")) / "model.onnx"
    before = answer(root / "source")
    compiled(moved, root / "out", target="onnx")
    data = moved.with_name("model.onnx.data")
    assert data.stat().st_nlink == 1
    assert (root / "out" / LINK).read_bytes() == data.read_bytes()
    data.write_bytes(bytes(WEIGHTS))
    check_artifact(root / "out")
    assert np.array_equal(answer(root / "out"), before)


def test_an_engine_is_the_same_with_links(model: Path, tmp_path: Path) -> None:
    if any(entry.kind == "tensorrt-rtx" and entry.missing for entry in availability()):
        pytest.skip("TensorRT-RTX cannot build here")
    compiled(model, tmp_path / "linked", target="tensorrt-rtx")
    compiled(model, tmp_path / "copied", target="tensorrt-rtx", link=False)
    assert sha256(tmp_path / "linked/model.engine") == sha256(tmp_path / "copied/model.engine")


def sums(held: dict[str, Weights]) -> Graph:
    """y = x + w for each weight w, all of the same shape."""
    total: Variable = Variable("x", np.dtype(np.float32), (SIDE,))
    inputs, nodes = [total], []
    for name, weights in held.items():
        made = Variable(f"{name}_sum", np.dtype(np.float32), (SIDE,))
        nodes.append(Node("Add", f"{name}_add", inputs=[total, Constant(name, weights)], outputs=[made]))
        total = made
    graph = Graph(nodes=nodes, inputs=inputs, outputs=[total], name="g")
    graph.opset, graph.ir_version = 21, 10
    return graph


def test_weights_of_safetensors_and_of_several_files_of_one_name(tmp_path: Path) -> None:
    """Offsets follow from the length of the header: most are no multiple of a page, some of no element."""
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(SIDE).astype(np.float32) for name in "abcde"}
    held: dict[str, Weights] = {}
    for folder, names in (("one", "ab"), ("two", "c")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "model.safetensors"
        save_file({name: values[name] for name in names}, path)
        content = path.read_bytes()
        for name in names:
            held[name] = Weights(F32, (SIDE,), FileRegion(path, content.index(values[name].tobytes())))
    odd = tmp_path / "odd.bin"
    odd.write_bytes(b"x" + values["d"].tobytes())
    held["d"] = Weights(F32, (SIDE,), FileRegion(odd, 1))
    held["e"] = Derived(F32, (SIDE,), lambda: values["e"])
    linked = {weights.source.path for weights in held.values() if isinstance(weights.source, FileRegion)}
    output = tmp_path / "out"
    output.mkdir()
    files = save_model(sums(held), output / "m.onnx", linked=linked)
    assert sorted(files) == sorted(output.iterdir())
    assert {path.name for path in files} == {
        "m.onnx", "m.onnx.data", "m.onnx.linked.model.safetensors", "m.onnx.linked-1.model.safetensors"
    }  # fmt: skip
    for constant in constants(load_model(output / "m.onnx")):
        assert np.array_equal(load_values(constant), values[constant.name])
    session = onnxruntime.InferenceSession(output / "m.onnx", providers=["CPUExecutionProvider"])
    expected = sum(values.values(), np.zeros(SIDE, np.float32))
    found = session.run(None, {"x": np.zeros(SIDE, np.float32)})[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)  # five FP32 numbers of about 1, added in another order


def test_weights_of_a_hugging_face_model_stay_in_its_files(tmp_path: Path) -> None:
    """Also where these are symbolic links, as in the hub's cache."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=99)
    BertModel(config).save_pretrained(tmp_path / "real")
    (tmp_path / "hf").mkdir()
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "hf" / path.name).symlink_to(path)
    document = Recipe.load("optimize").with_values({"target.kind": "onnxruntime", "target.link_weights": True}, "test")
    for _ in range(2):  # the second finds the export in the cache
        report = run_compile(str(tmp_path / "hf"), document, tmp_path / "out")
        linked = tmp_path / "out/model.onnx.linked.model.safetensors"
        assert linked.samefile(tmp_path / "real/model.safetensors")
        assert not linked.is_symlink()
        assert report.status == "done"
        check_artifact(tmp_path / "out")
