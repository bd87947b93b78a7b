"""Dumps of passes: each file is the graph as it was then, and weights are on the disk once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest

from llmc.compiler import pipeline
from llmc.compiler.dump import PassDump
from llmc.compiler.errors import LlmcError
from llmc.passes.fuse.fuse_gelu import FuseGelu
from llmc.passes.graph import Constant, Graph, copy_graph, load_model, to_model
from llmc.passes.simplify.eliminate_dead import EliminateDead

SIZE = 64
PASSES = [FuseGelu(), EliminateDead()]


@pytest.fixture
def graph(parse: Any) -> Graph:
    """A product with a weight of 16 KB, then an exact GELU."""
    made: Graph = parse(
        f"(float[N,{SIZE}] x, float[{SIZE},{SIZE}] w) => (float[N,{SIZE}] y) "
        "<float s = {1.41421356}, float one = {1.0}, float h = {0.5}> "
        "{ p = MatMul(x, w) d = Div(p, s) e = Erf(d) a = Add(e, one) m = Mul(p, a) y = Mul(m, h) }"
    )
    values = np.random.default_rng(0).standard_normal((SIZE, SIZE)).astype(np.float32)
    made.nodes[0].inputs[1] = Constant("w", values)
    made.inputs = made.inputs[:1]
    return made


def dumped(graph: Graph, dump: PassDump) -> list[onnx.ModelProto]:
    """Run the passes with the dump listening; every graph as it was, weights inside."""
    graphs = []
    loaded = pipeline.loaded(graph)
    for step in (loaded, *pipeline.run(loaded, PASSES, lambda _: None)):
        dump(step)
        graphs.append(to_model(copy_graph(step.graph)))
    return graphs


def test_each_file_is_the_graph_after_its_pass(graph: Graph, tmp_path: Path) -> None:
    expected = dumped(graph, PassDump(tmp_path / "d"))
    files = sorted(path.name for path in (tmp_path / "d").glob("*.onnx"))
    assert files == ["00-load.onnx", "01-fuse-gelu.onnx", "02-eliminate-dead.onnx"]
    for name, model in zip(files, expected, strict=True):
        assert to_model(load_model(tmp_path / "d" / name)) == model
        onnx.checker.check_model(tmp_path / "d" / name, full_check=True)


def test_weights_are_written_once(graph: Graph, tmp_path: Path) -> None:
    dumped(graph, PassDump(tmp_path / "d"))
    assert (tmp_path / "d/weights.data").stat().st_size == 4 * SIZE * SIZE
    assert all(path.stat().st_size < 4096 for path in (tmp_path / "d").glob("*.onnx"))


def test_equal_weights_are_written_once_whatever_array_they_are_in(graph: Graph, tmp_path: Path) -> None:
    dump = PassDump(tmp_path / "d")
    dump(pipeline.loaded(graph))
    weight = next(node for node in graph.nodes if node.op == "MatMul").inputs[1]
    for factor, size in ((1, 4 * SIZE * SIZE), (2, 8 * SIZE * SIZE)):
        weight._values = factor * np.array(weight._values)
        dump(pipeline.loaded(graph))
        assert (tmp_path / "d/weights.data").stat().st_size == size
    assert np.array_equal(load_model(tmp_path / "d/00-load.onnx").nodes[0].inputs[1].values, weight._values)


def test_an_earlier_dump_is_replaced(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("07-fuse-gelu.onnx", "weights.data"):
        (tmp_path / "d" / name).write_bytes(b"old")
    expected = dumped(graph, PassDump(tmp_path / "d"))
    assert len(list((tmp_path / "d").glob("*.onnx"))) == len(expected)
    assert to_model(load_model(tmp_path / "d/02-eliminate-dead.onnx")) == expected[-1]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "01-load.onnx").write_bytes(b"old")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(LlmcError, match=r"holds 'thesis\.txt', which is no part of a dump"):
        PassDump(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"01-load.onnx", "thesis.txt"}


def test_the_model_that_is_compiled_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "03-fuse-gelu.onnx").write_bytes(b"a graph of an earlier dump")
    with pytest.raises(LlmcError, match="holds the model itself"):
        PassDump(tmp_path, str(tmp_path / "03-fuse-gelu.onnx"))
    assert (tmp_path / "03-fuse-gelu.onnx").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LlmcError, match=r"--dump-passes: .*/file/d cannot be written: Not a directory"):
        PassDump(tmp_path / "file/d")
