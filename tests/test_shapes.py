"""The models of real shapes that benchmarks make: both forms are the model that transformers runs."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.data import random_feeds
from llmc.compiler.loaders.signature import run_torch, signature_of
from llmc.compiler.loaders.tasks import TEXT_GENERATION
from llmc.compiler.session import Session
from llmc.passes.graph import load_model

TOLERANCE = {"float32": 1e-5, "float16": 2e-2}
"""Of an output's largest magnitude: both sides round each of some hundred dependent operations, by 2^-24 and 2^-11."""


@pytest.fixture(scope="module")
def shapes() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent / "bench"))
        return importlib.import_module("shapes")


@pytest.mark.parametrize(
    ("dtype", "tied", "heads"), [("float32", False, 2), pytest.param("float16", True, 4, marks=pytest.mark.slow)]
)
def test_both_forms_are_transformers_own_model(shapes: Any, tmp_path: Path, dtype: str, tied: bool, heads: int) -> None:
    """Logits and cache, with padding and a past, against torch."""
    from transformers import AutoModelForCausalLM

    shape = replace(shapes.SHAPES["llama-tiny"], dtype=dtype, tied=tied, key_value_heads=heads)
    shapes.write_checkpoint(shape, tmp_path / "hf")
    shapes.write_onnx(shape, tmp_path / "onnx")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype).eval()
    signature = signature_of(model, TEXT_GENERATION, None, tmp_path / "hf")
    graph = load_model(tmp_path / "onnx" / "model.onnx")
    found, expected = (sorted((t.name, t.dtype, tuple(t.shape)) for t in form.inputs) for form in (graph, signature))
    assert found == expected
    session = Session(graph)
    for sizes in ({"batch": 2, "sequence": 4, "past_sequence": 3}, {"batch": 1, "sequence": 5, "past_sequence": 0}):
        feeds = random_feeds(graph.inputs, sizes, {"input_ids": shape.vocabulary}, np.random.default_rng(0))
        outputs, truth = session.run(feeds), run_torch(model, signature, feeds)
        assert outputs.keys() == truth.keys()
        for name, value in truth.items():
            scale = np.abs(value).max()
            assert np.abs(outputs[name].astype(np.float32) - value).max() <= TOLERANCE[dtype] * scale, name


def test_the_files_hold_every_weight_once(shapes: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    shape = shapes.SHAPES["llama-tiny"]
    shapes.write_checkpoint(shape, tmp_path)
    shapes.write_onnx(shape, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert [name for name, _ in shape.weights()] == list(stored)
    assert sum(values.nbytes for values in stored.values()) == shape.bytes
    for name, values in stored.items():
        found = tensors[name] if name in tensors else tensors[f"{name}.T"].T
        np.testing.assert_array_equal(found, values)
        assert len(np.unique(values)) > min(values.size, 1000) / 4, "values of its own"
