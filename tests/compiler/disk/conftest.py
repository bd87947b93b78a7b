"""Small file systems, mounted for each test, and a model of 16 MB."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llmc.passes.graph import Constant, Graph, Node, Variable, save_model

SIDE, LAYERS = 1024, 4
WEIGHTS = SIDE * SIDE * 4 * LAYERS
"""Bytes."""
RECIPE = """
model: {dimensions: {batch: [1, 1, 2]}}
passes: [eliminate-identity, PASSES eliminate-dead]
target: {TARGET}
verify: {samples: 1, budgets: {cosine: 0.9}}
"""
RECIPES = {
    "half": ("convert-fp16,", "kind: onnx"),
    "same": ("", "kind: onnx"),
    "linked": ("", "kind: onnxruntime, link_weights: true"),
}
"""Name → passes, target."""
LEAST = {"xfs": 320}
"""MB that a file system has at least."""
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
            file.truncate(max(megabytes, LEAST.get(kind, 0)) << 20)
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
    return write_model(tmp_path / "source")


def write_model(folder: Path, side: int = SIDE, layers: int = LAYERS) -> Path:
    """Square products with weights as external data, and three recipes beside: halved, left, and left and linked."""
    outputs = [Variable(f"y{i}", np.dtype(np.float32), ["batch", side]) for i in range(2 * layers + 1)]
    rng, nodes = np.random.default_rng(0), list[Node]()
    for i in range(0, 2 * layers, 2):
        weights = Constant(f"w{i}", rng.standard_normal((side, side), np.float32) / np.float32(side**0.5))
        nodes.append(Node("MatMul", f"product{i}", inputs=[outputs[i], weights], outputs=[outputs[i + 1]]))
        nodes.append(Node("Identity", f"same{i}", inputs=[outputs[i + 1]], outputs=[outputs[i + 2]]))
    graph = Graph(nodes=nodes, inputs=outputs[:1], outputs=outputs[-1:], name="g")
    graph.opset, graph.ir_version = 20, 10
    folder.mkdir()
    save_model(graph, folder / "model.onnx", inline_below=1024)
    for name, (passes, target) in RECIPES.items():
        text = RECIPE.replace("PASSES", passes).replace("TARGET", target)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / "model.onnx"


def recipe(model: Path, name: str) -> Path:
    return model.with_name(f"{name}.yaml")


def same_models(one: Path, other: Path) -> bool:
    names = [sorted(path.name for path in folder.glob("model.onnx*")) for folder in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def llmc(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmc.compiler", *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True)
