"""Models written to files: the bytes are protobuf's own, and all that is outside is found again."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings

from llmc.compiler.session import Session
from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Variable,
    Weights,
    constants,
    load_model,
    load_values,
    save_model,
    to_model,
)

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.int64, np.bool_, ml_dtypes.int4, ml_dtypes.uint4]


def sums(arrays: list[Any], doc: str = "") -> Graph:
    """One Identity for each array, every one of another name and type."""
    outputs = [Variable(f"y{i}", values.dtype, values.shape) for i, values in enumerate(arrays)]
    nodes = [
        Node("Identity", f"n{i}", inputs=[Constant(f"w{i}", values)], outputs=[output])
        for i, (values, output) in enumerate(zip(arrays, outputs, strict=True))
    ]
    nodes[0].metadata["module"] = "here"
    graph = Graph(nodes=nodes, inputs=[], outputs=outputs, name="g", doc_string=doc)
    graph.opset, graph.ir_version = 21, 10
    graph.metadata = {"about": doc} if doc else {}
    return graph


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.sampled_from(TYPES), st.sampled_from([1, 3, 127, 128, 1024, 5000])), min_size=1),
    doc=st.sampled_from(["", "described"]),
)
def test_the_bytes_are_those_of_protobuf(sizes: list[tuple[Any, int]], doc: str, tmp_path: Path) -> None:
    """Sizes stand on both sides of 1 KB, and of lengths that take one byte, two, or three."""
    graph = sums([np.arange(size).astype(dtype) for dtype, size in sizes], doc)
    assert save_model(graph, tmp_path / "m.onnx") == [tmp_path / "m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == to_model(graph).SerializeToString(deterministic=True)


def test_a_model_without_weights(parse: Any, tmp_path: Path) -> None:
    graph = parse("(float[2] x) => (float[2] y) { y = Abs(x) }")
    save_model(graph, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == to_model(graph).SerializeToString(deterministic=True)


def test_weights_are_written_one_at_a_time(tmp_path: Path) -> None:
    arrays = [np.full((1 << 20,), i, np.float32) for i in range(8)]
    graph = sums(arrays)
    tracemalloc.start()
    try:
        save_model(graph, tmp_path / "m.onnx")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "m.onnx").stat().st_size > 8 << 22
    assert peak < 1 << 22  # of NumPy and Python; no weight was copied
    for constant in constants(load_model(tmp_path / "m.onnx")):
        assert np.array_equal(load_values(constant), arrays[int(constant.name[1:])])


@pytest.mark.parametrize("inline_below", [None, 1, 1024, 1 << 30])
def test_a_large_constant_that_a_subgraph_gives_back_stays_in_the_proto(
    inline_below: int | None, parse: Any, tmp_path: Path
) -> None:
    graph = parse(
        "(bool q, float[512] x) => (float[512] y) { y = If(q) <"
        "then_branch = t () => (float[512] z) { z = Identity(x) }, "
        "else_branch = e () => (float[512] z) { z = Neg(x) }> }"
    )
    branch = graph.nodes[0].attrs["then_branch"]
    values = np.arange(512, dtype=np.float32)
    branch.nodes, branch.outputs = [], [Constant("z", values)]
    save_model(graph, tmp_path / "m.onnx", inline_below=inline_below)
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    found = Session(load_model(tmp_path / "m.onnx")).run({"q": np.array(True), "x": -values})["y"]
    assert np.array_equal(found, values)


@pytest.mark.parametrize("inline_below", [None, 1024])
def test_weights_in_a_file_go_to_the_new_one_without_being_read(
    inline_below: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From external data, four bits a value included, into one file and into external data."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-7, 8, 5001).astype(dtype) for dtype in (np.float32, ml_dtypes.bfloat16, ml_dtypes.int4)]
    (tmp_path / "source").mkdir()
    save_model(sums(arrays), tmp_path / "source/m.onnx", inline_below=1024)
    graph = load_model(tmp_path / "source/m.onnx")
    written = list[tuple[str, int]]()
    with monkeypatch.context() as patch:
        patch.setattr(Weights, "load", lambda _self: pytest.fail("a weight was read"))
        save_model(graph, tmp_path / "m.onnx", inline_below=inline_below, wrote=lambda *piece: written.append(piece))
    assert written == [("w0", 20004), ("w1", 10002), ("w2", 2501)]
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    for constant, values in zip(constants(load_model(tmp_path / "m.onnx")), arrays, strict=True):
        assert np.array_equal(load_values(constant).astype(np.float32), values.astype(np.float32))
