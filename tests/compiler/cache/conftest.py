"""A small model that takes every kind of entry in the cache, and what of an artifact must be the same each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

MODEL = """<ir_version: 10, opset_import: ["": 20]>
g (float[batch,32] x) => (float[batch,32] y) <float s = {1.41421354}, float one = {1.0}, float h = {0.5}> {
  p = MatMul(x, w)
  i = Identity(p)
  d = Div(i, s) e = Erf(d) a = Add(e, one) m = Mul(i, a) g = Mul(m, h)
  q = MatMul(g, v)
  y = Relu(q)
}"""
RECIPE = """
model: {dimensions: {batch: [1, 2, 4]}}
passes: [fold-constants, eliminate-identity, fuse-gelu, quantize-int8, convert-fp16, eliminate-dead]
target: {kind: KIND}
verify: {samples: 3, budgets: {cosine: 0.9}}
"""


def write_model(folder: Path, seed: int = 0) -> Path:
    """`folder`/model.onnx with two weights of 4 KB, and a recipe beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    model = onnx.parser.parse_model(MODEL)
    for name in ("w", "v"):
        values = rng.standard_normal((32, 32)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, folder / "model.onnx")
    (folder / "recipe.yaml").write_text(RECIPE.replace("KIND", "onnx"), encoding="utf-8")
    return folder / "model.onnx"


def content(artifact: Path) -> dict[str, Any]:
    """All of an artifact that must not depend on when, how often and how fast it was made."""
    report = json.loads((artifact / "report.json").read_bytes())
    del report["timings"]
    manifest = json.loads((artifact / "manifest.json").read_bytes())
    del manifest["manifest"]
    for name in [name for name in manifest["files"] if name.startswith("report.")]:
        del manifest["files"][name]
    files = {
        path.name: path.read_bytes() for path in artifact.iterdir() if path.suffix in (".onnx", ".engine", ".yaml")
    }
    assert {"model.onnx", "recipe.yaml"} <= files.keys()
    return {"report": report, "manifest": manifest, **files}


def timings(artifact: Path) -> Any:
    """The part of the report that differs."""
    return json.loads((artifact / "report.json").read_bytes())["timings"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")
