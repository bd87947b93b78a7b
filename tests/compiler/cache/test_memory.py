"""Where the weights of graphs stand between passes: in the user's file, in the cache, or in a file without a name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler import pipeline
from llmc.compiler.cache.memory import KeptWeights, Memory, State
from llmc.compiler.cache.scratch import ScratchRegion
from llmc.compiler.cache.store import Store
from llmc.compiler.spill import spilling_to
from llmc.passes.base import Ledger
from llmc.passes.graph import Constant, Derived, Graph, Structure, Weights, load_values, save_model, to_structure
from llmc.passes.graph import load_model as read
from llmc.passes.precision.quantize_weights import QuantizeWeights

DEPTH = 1536
"""Of a square weight: 1.2 MB in 4 bits, which is large."""


@pytest.fixture(params=["cached", "not cached", "no room in the cache"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Memory]:
    if request.param == "not cached":
        yield Memory()
        return
    store = Store(tmp_path / "cache", 1 << 30 if request.param == "cached" else 1 << 20)
    store.open()
    yield Memory(store)
    store.close()


def product(parse: Any) -> Graph:
    graph: Graph = parse(
        f"(float[N,{DEPTH}] x, float[{DEPTH},{DEPTH}] w) => (float[N,{DEPTH}] y) {{ y = MatMul(x, w) }}"
    )
    weight = np.random.default_rng(0).standard_normal((DEPTH, DEPTH), dtype=np.float32)
    graph.inputs.pop().to_constant(weight)
    return graph


def test_what_a_pass_makes_of_weights_goes_to_disk(memory: Memory, parse: Any, tmp_path: Path) -> None:
    place = tmp_path / "output"
    place.mkdir()
    with spilling_to(place):
        step = pipeline.run_pass(
            pipeline.loaded(product(parse), memory).end,
            1,
            QuantizeWeights(method="rtn"),
            lambda _: None,
            Ledger(),
            memory,
        )
    made = step.end.structure.weights["w_int4"]
    assert isinstance(made, Weights)
    region = made.region()
    assert region is not None
    kept = memory.store is not None and memory.store.limit > 1 << 20
    assert isinstance(made, KeptWeights) if kept else isinstance(region, ScratchRegion)
    assert list(place.iterdir()) == []
    save_model(step.graph, place / "model.onnx", inline_below=1024)
    (stored,) = (
        t for t in read(place / "model.onnx").nodes[0].inputs if isinstance(t, Constant) and t.name == "w_int4"
    )
    np.testing.assert_array_equal(load_values(stored), made.load())


def test_weights_in_the_user_s_file_are_referred_to(parse: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """By a record too, which says where they are: the cache has no copy of them."""
    save_model(product(parse), tmp_path / "model.onnx", inline_below=1024)

    def weights() -> Weights:
        (constant,) = (t for t in read(tmp_path / "model.onnx").nodes[0].inputs if isinstance(t, Constant))
        held: Weights = constant._values
        return held

    store = Store(tmp_path / "cache", 1 << 30)
    store.open()
    request.addfinalizer(store.close)
    first = Memory(store)
    structure = to_structure(read(tmp_path / "model.onnx"))
    first.keep_state("load", ["it"], {"weight": "w"}, first.state(structure, stays=["w"]))
    blobs = [path for path in (tmp_path / "cache").rglob("blobs/*/*") if path.is_file()]
    assert sum(path.stat().st_size for path in blobs) < 4096

    assert Memory(store).find_state("load", "it") is None, "nobody says where the weight is"
    found = Memory(store).find_state("load", "it", origins=lambda value, _: {value["weight"]: weights()})
    assert found is not None
    value, state = found
    assert value["weight"] == "w"
    (constant,) = (t for t in state.graph.nodes[0].inputs if isinstance(t, Constant))
    np.testing.assert_array_equal(load_values(constant), load_values(product(parse).nodes[0].inputs[1]))


def test_a_weight_is_named_by_its_file_and_place_without_being_read(
    parse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    save_model(product(parse), tmp_path / "model.onnx", inline_below=1024)
    store = Store(tmp_path / "cache", 1 << 30)
    store.open()
    request.addfinalizer(store.close)
    data = (tmp_path / "model.onnx.data").resolve()

    def state(digest: str) -> State:
        structure = to_structure(read(tmp_path / "model.onnx"))
        return Memory(store).state(structure, stays=["w"], files={data: digest})

    monkeypatch.setattr(Weights, "load", lambda _: pytest.fail("it was read"))
    assert state("one").digest == state("one").digest
    assert state("one").digest != state("another").digest


def test_says_how_many_bytes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Memory) -> None:
    now = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    said: list[str] = []
    values = np.ones((1024, 1024), np.float32)
    made = Derived(1, values.shape, lambda: values)
    with spilling_to(tmp_path), memory.telling(said.append, "pass 3"):
        memory.hold(1, values.shape, memoryview(values).cast("B"))
        memory.hold(1, values.shape, memoryview(values).cast("B"))
        memory.state(Structure(onnx.ModelProto(), {"w": made}))
    assert said[:3] == ["pass 3", "pass 3: 4.19 MB, 1 weights", "pass 3: 8.39 MB, 2 weights"]
    kept = memory.store is not None and memory.store.limit > 1 << 20
    assert (said[-1] == "pass 3: keeping its weights: 4.19 MB of 4.19 MB, weight 1 of 1, 0 s left") is kept
