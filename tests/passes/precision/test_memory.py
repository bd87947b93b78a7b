"""Memory of the passes that change weights: it does not grow with their number, where a run keeps what they make."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest

from llmc.compiler.cache.memory import Memory
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.spill import spilling_to
from llmc.passes import base
from llmc.passes.base import Context, Ledger, Pass
from llmc.passes.graph import load_model
from llmc.passes.precision.calibration import Calibration
from llmc.passes.precision.quantize_mxfp8 import QuantizeMxfp8
from llmc.passes.precision.quantize_nvfp4 import QuantizeNvfp4
from llmc.passes.precision.quantize_weights import QuantizeWeights
from llmc.passes.precision.share_weights import ShareWeights

SIZE = 256
"""Of a square weight."""
FEW, MANY = 4, 8
STEPS = {
    "rtn": QuantizeWeights(method="rtn"),
    "hqq": QuantizeWeights(method="hqq"),
    "gptq": QuantizeWeights(method="gptq", memory=1),
    "awq": QuantizeWeights(method="awq", memory=1, insert_mul=True),
    "nvfp4": QuantizeNvfp4(),
    "mxfp8": QuantizeMxfp8(),
    "share-weights": ShareWeights(bits=4, memory=1, calibration=Calibration(samples=1)),
}

SLOW = ("hqq", "awq", "share-weights")


def write(folder: Path, count: int) -> Path:
    """Products one after the other, their weights in a file."""
    names = ["x", *(f"h{number}" for number in range(count))]
    nodes = [onnx.helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], f"n{i}") for i in range(count)]
    inputs, outputs = ([onnx.helper.make_tensor_value_info(name, 1, ["N", SIZE])] for name in (names[0], names[-1]))
    rng = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(rng.standard_normal((SIZE, SIZE), np.float32) / SIZE**0.5, f"w{i}")
        for i in range(count)
    ]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(folder / "model.onnx"), save_as_external_data=True, location="data", size_threshold=0)
    return folder / "model.onnx"


def peak(step: Pass, folder: Path, count: int) -> int:
    """Bytes that a run of the pass takes at most beside the graph."""
    folder.mkdir()
    graph = load_model(write(folder, count))
    rows = np.random.default_rng(1).standard_normal((16, SIZE)).astype(np.float32)
    with spilling_to(folder):
        context = Context(Ledger(), SampledActivations([{"x": rows}]), Memory())
        tracemalloc.start()
        try:
            result = step.run(graph, context)
            found = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert len([rewrite for rewrite in result.rewrites if rewrite.rule != "ScaleChannels"]) == count
    return found


@pytest.mark.parametrize(
    "step",
    [pytest.param(step, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, step in STEPS.items()],
)
def test_does_not_grow_with_the_number_of_weights(step: Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "STORED_FROM", 1 << 10)
    peak(step, tmp_path / "warm", 1)  # what is imported and remembered once
    few, many = peak(step, tmp_path / "few", FEW), peak(step, tmp_path / "many", MANY)
    kept = (MANY - FEW) * SIZE * SIZE // 2
    assert many - few < kept, "what the values would take in 4 bits; nodes and their names take up to 20 KB a weight"
