"""Small file systems, mounted for each test, and a model of 16 MB."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from llmc.passes.graph import load_model, save_model

SIDE, LAYERS = 1024, 4
WEIGHTS = SIDE * SIDE * 4 * LAYERS
"""Bytes."""
RECIPE = """
model: {dimensions: {batch: [1, 1, 2]}}
passes: [eliminate-identity, PASSES eliminate-dead]
target: {kind: onnx}
verify: {samples: 1, budgets: {cosine: 0.9}}
"""
Mounted = Callable[[int], Path]
"""Makes a file system of so many MB; its root."""


@pytest.fixture
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """ext4 in a file, unless the test names another kind."""
    kind = getattr(request, "param", "ext4")
    made = list[Path]()

    def mount(megabytes: int) -> Path:
        image, root = tmp_path / f"{len(made)}.image", tmp_path / f"disk{len(made)}"
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        root.mkdir()
        for words in ([f"mkfs.{kind}", "-q", image], ["mount", "-o", "loop", image, root]):
            try:
                subprocess.run(words, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no {kind} can be mounted here: {error}")
        made.append(root)
        shutil.rmtree(root / "lost+found", ignore_errors=True)
        return root

    try:
        yield mount
    finally:
        for root in made:
            subprocess.run(["umount", "--lazy", root], check=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """16 MB of weights as external data, and two recipes beside: one halves them, the other leaves them."""
    text = " ".join(f"y{i} = MatMul(y{i - 1}, w{i}) z{i} = Identity(y{i})" for i in range(1, LAYERS + 1))
    header = '<ir_version: 10, opset_import: ["": 20]>'
    proto = onnx.parser.parse_model(
        f"{header} g (float[batch,{SIDE}] y0) => (float[batch,{SIDE}] y) {{ {text} y = Relu(y{LAYERS}) }}"
    )
    rng = np.random.default_rng(0)
    for i in range(1, LAYERS + 1):
        values = rng.standard_normal((SIDE, SIDE)).astype(np.float32) / SIDE**0.5
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, f"w{i}"))
    folder = tmp_path / "source"
    folder.mkdir()
    onnx.save(proto, folder / "whole.onnx")
    save_model(load_model(folder / "whole.onnx"), folder / "model.onnx", inline_below=1024)
    (folder / "same.yaml").write_text(RECIPE.replace("PASSES", ""), encoding="utf-8")
    (folder / "half.yaml").write_text(RECIPE.replace("PASSES", "convert-fp16,"), encoding="utf-8")
    return folder / "model.onnx"


def recipe(model: Path, name: str) -> Path:
    return model.with_name(f"{name}.yaml")


def same_models(one: Path, other: Path) -> bool:
    names = [sorted(path.name for path in folder.glob("model.onnx*")) for folder in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def llmc(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmc.compiler", *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True)
