"""A compiled model to generate with: a decoder with learned weights, or what a file's own `checkpoint` is."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.compiler.driver import compile as run_compile
from llmc.compiler.recipe import Recipe

TINY_LLAMA = Path(__file__).parents[2] / "assets" / "tiny_llama"
RECIPE = """
model: {dimensions: {batch: [1, 1, 4], sequence: [1, 8, 256], past_sequence: [0, 8, 256]}}
passes: [{recipe: optimize}]
target: {kind: onnxruntime}
"""


@pytest.fixture(autouse=True)
def own_cache(no_shared_cache: Path) -> Path:
    """One cache for all files of this folder: how a model is exported is not what they test."""
    return no_shared_cache / "shared"


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return TINY_LLAMA


@pytest.fixture(scope="module")
def recipe() -> str:
    return RECIPE


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "r.yaml").write_text(recipe, encoding="utf-8")
    run_compile(str(checkpoint), Recipe.load(folder / "r.yaml"), folder / "out")
    return folder / "out"
