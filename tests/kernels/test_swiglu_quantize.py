from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.session import Session
from llmc.kernels.swiglu_quantize.reference import product, reference
from llmc.passes.graph import Array

RELATIVE = 2.0**-18
"""What a dozen float32 operations may move a value by."""
LEVELS = (np.int8, ml_dtypes.float8_e4m3fn)
WAYS = ("contiguous", "padded", "plugin")
"""How inputs lie in memory; or without gaps, and launched as TensorRT launches a plugin."""


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Array]:
    """Inputs of small and odd sizes, up to where the sigmoid is 0 or 1."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([0.0, 1.0, 30.0, 200.0]))
    return {
        "gate": (rng.standard_normal(shape) * size).astype(dtype),
        "up": rng.standard_normal(shape).astype(dtype),
        "scale": np.float32(draw(st.sampled_from([0.003, 0.02, 1.5]))),
    }


def values(problem: dict[str, Array]) -> Array:
    return product(problem["gate"], problem["up"]) / np.float64(problem["scale"])


@pytest.mark.parametrize("levels", LEVELS)
@settings(deadline=None, max_examples=15)
@given(problem=problems())
def test_the_body_is_the_reference(one_node: Any, nearest_levels: Any, levels: Any, problem: dict[str, Array]) -> None:
    given_all = {name: np.asarray(value) for name, value in problem.items()} | {"zero_point": np.zeros((), levels)}
    graph = one_node("SwiGLUQuantize", given_all, {"quantized": levels}, ("gate", "up"))
    found = Session(graph).run({"gate": problem["gate"], "up": problem["up"]})["quantized"]
    # ONNX Runtime's Sigmoid is an approximation: below 0 it is off by up to 1.25e-7, however small it is itself.
    factors = np.abs(problem["gate"].astype(np.float64) * problem["up"]) / np.float64(problem["scale"])
    nearest_levels(found.view(levels), values(problem), RELATIVE, 1e-9 + factors * 2.0**-22)
    nearest_levels(reference(**given_all), values(problem), 1e-6)  # E4M3 goes by way of float32


@pytest.mark.parametrize(("dtype", "levels"), [(np.float16, np.int8), (np.float32, LEVELS[1])])
def test_an_engine_is_built_through_the_body(
    one_node: Any, builds: Any, dequantized: Any, dtype: Any, levels: Any
) -> None:
    given_all = {
        "gate": np.zeros((1, 64), dtype),
        "up": np.zeros((1, 64), dtype),
        "scale": np.array(0.02, np.float32),
        "zero_point": np.zeros((), levels),
    }
    built = builds(dequantized(one_node("SwiGLUQuantize", given_all, {"quantized": levels}, ("gate", "up"))))
    assert "node" in {node for layer in built.layers for node in layer["nodes"]}


@settings(deadline=None, max_examples=15)
@given(problem=problems(), way=st.sampled_from(WAYS))
def test_the_kernel_is_the_reference(
    interpreter: Any, nearest_levels: Any, problem: dict[str, Array], way: str
) -> None:
    """In Triton's interpreter, whose conversions to E4M3 are not those of a GPU: int8 alone."""
    inputs = problem | {"scale": problem["scale"].reshape(1), "zero_point": np.zeros(1, np.int8)}
    columns = {"gate": 1, "up": 1} if way == "padded" else {}
    outputs = {"quantized": (problem["gate"].shape, np.int8)}
    found = interpreter("swiglu_quantize", inputs, outputs, columns, way == "plugin")
    nearest_levels(found["quantized"], values(problem), RELATIVE)


def test_infinite_values_saturate(interpreter: Any) -> None:
    gate = np.float32([[np.inf, np.inf, -200.0, 3e38, 1.0]])
    up = np.float32([[1.0, -1.0, 1.0, -1.0, 0.0]])
    outputs = {"quantized": (gate.shape, np.int8)}
    scale, zero_point = np.float32([0.02]), np.zeros(1, np.int8)
    given = {"gate": gate, "up": up, "scale": scale, "zero_point": zero_point}
    found = interpreter("swiglu_quantize", given, outputs)
    assert found["quantized"].tolist() == [[127, -128, 0, -128, 0]]
