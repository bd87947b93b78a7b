"""A decoder with learned weights, compiled."""

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


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return TINY_LLAMA


@pytest.fixture(scope="session")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    run_compile(str(checkpoint), Recipe.load(folder / "r.yaml"), folder / "out")
    return folder / "out"
