from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.graph import Array, Constant, Graph, Node, Variable, copy_graph
from llmc.passes.precision.calibration import Clipping
from llmc.passes.precision.clip_search import searched
from llmc.passes.precision.levels import INT8
from llmc.passes.precision.quantize_int8 import QuantizeInt8

DEPTH, CHANNELS, ROWS = 16, 8, 400


def graph(weight: Array, op: str = "MatMul") -> Graph:
    x, y = Variable("x", np.dtype(np.float32), ["N", DEPTH]), Variable("y", np.dtype(np.float32), ["N", CHANNELS])
    return Graph([Node(op, "product", {}, [x, Constant("w", weight)], [y])], [x], [y], opset=20, ir_version=10)


def data(outlier: float, seed: int = 0) -> Array:
    """Rows of which one value in a hundred, in the first channel, is `outlier`."""
    rng = np.random.default_rng(seed)
    rows = rng.uniform(-1, 1, (ROWS, DEPTH)).astype(np.float32)
    rows[::100, 0] = outlier
    return rows


def clip(weight: Array, rows: Array) -> float:
    return searched(graph(weight), ["x"], INT8, SampledActivations([{"x": rows}]), 8)["x"]


def weight(first: float) -> Array:
    """The first input channel counts `first` times as much as the others."""
    made = np.random.default_rng(1).standard_normal((DEPTH, CHANNELS)).astype(np.float32)
    made[0] *= first
    return made


def test_what_no_weight_reads_is_clipped_away() -> None:
    assert clip(weight(0), data(50)) < 1.1


def test_what_a_weight_reads_is_kept() -> None:
    assert clip(weight(1), data(3)) > 2.9


@pytest.mark.parametrize("first", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("outlier", [3, 50])
def test_no_method_loses_less(first: float, outlier: float) -> None:
    """The error of the quantized product itself, in ONNX Runtime: of each row, relative to the spread of its result."""
    held, rows = graph(weight(first)), data(outlier)
    exact = Session(held).run({"x": rows})["y"]
    spread = np.mean((exact - exact.mean(0)) ** 2, axis=1, keepdims=True)

    def loss(method: str) -> float:
        quantized = copy_graph(held)
        step = QuantizeInt8(calibration=Clipping(method=method, samples=8), correct_bias=True)  # type: ignore[arg-type]
        step.run(quantized, Context(activations=SampledActivations([{"x": rows}])))
        off = Session(quantized).run({"x": rows})["y"] - exact
        return float(np.mean((off - off.mean(0)) ** 2 / spread))

    # Rounded weights are the same for all, but their errors do not simply add: 5 %.
    assert loss("search") <= 1.05 * min(loss(method) for method in ("minmax", "mse", "percentile", "entropy"))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1 << 30), st.integers(1, 7))
def test_neither_order_nor_batches_matter(seed: int, parts: int) -> None:
    rows = data(20, seed % 5)
    shuffled = np.random.default_rng(seed).permutation(rows)
    held = graph(weight(0.1))
    found = [
        searched(held, ["x"], INT8, SampledActivations([{"x": part} for part in split]), ROWS)["x"]
        for split in ([rows], np.array_split(shuffled, parts))
    ]
    assert found[0] == found[1]


def test_reports_tell_the_method_that_was_taken() -> None:
    activations = SampledActivations([{"x": data(50)}])
    found = searched(graph(weight(0)), ["x"], INT8, activations, 8)["x"]
    told = activations.calibrated["x"]
    assert (told.method, told.clip) == ("percentile", found)  # of any percentile: the outliers are 1 in 1,600
    assert told.percentile < 99.95


def test_products_that_are_not_of_a_matrix_take_mse() -> None:
    held = graph(np.ones((1, DEPTH), np.float32), "Sub")
    activations: Any = SampledActivations([{"x": data(50)}])
    assert (
        searched(held, ["x"], INT8, activations, 8)["x"]
        == activations.amax(held, ["x"], method="mse", percentile=100.0, samples=8)["x"]
    )


def test_earlier_statistics_cannot_answer_a_search() -> None:
    with pytest.raises(ValueError, match="method 'search' runs data: leave statistics out"):
        Clipping.model_validate({"method": "search", "statistics": "calibration.json"}, strict=False)
