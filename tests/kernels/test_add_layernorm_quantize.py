from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.session import Session
from llmc.kernels.add_layernorm_quantize.reference import normalized, reference
from llmc.passes.graph import Array

EPSILON = 1e-5
LEVELS = (np.int8, ml_dtypes.float8_e4m3fn)
WAYS = ("contiguous", "padded", "plugin")
"""How inputs lie in memory; or without gaps, and launched as TensorRT launches a plugin."""


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Array]:
    """Inputs of small and odd sizes, some of them zero rows, on scales that saturate and that do not."""
    rows, depth = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([0.0, 1e-3, 1.0, 100.0]))
    return {
        "x": (rng.standard_normal((rows, depth)) * size).astype(dtype),
        "residual": (rng.standard_normal((rows, depth)) * size).astype(dtype),
        "weight": rng.standard_normal(depth).astype(dtype),
        "bias": rng.standard_normal(depth).astype(dtype),
        "scale": np.float32(draw(st.sampled_from([0.003, 0.02, 0.5]))),
    }


def values(problem: dict[str, Array]) -> tuple[Array, Array]:
    """The sum, and the values to quantize over their scale."""
    total, scaled = normalized(problem["x"], problem["residual"], problem["weight"], problem["bias"], epsilon=EPSILON)
    return total, scaled / np.float64(problem["scale"])


def bound(problem: dict[str, Array], total: Array, scaled: Array, sum_off: float = 0.0) -> Array:
    """How far float32 may be off the values over their scale: what subtracting the mean cancels, and a dozen roundings.

    The mean of D values is off by D roundings of the largest; the sum may be off by `sum_off` of it besides.
    """
    wide = total.astype(np.float64)
    root = np.sqrt(wide.var(-1, keepdims=True) + EPSILON)
    off = (2.0**-23 * (wide.shape[-1] + 8) + 4 * sum_off) * np.abs(wide).max(-1, keepdims=True)
    cancelled = off / root * np.abs(problem["weight"].astype(np.float64))
    added = 2.0**-20 * np.abs(problem["bias"].astype(np.float64))
    return np.asarray((cancelled + added) / np.float64(problem["scale"]) + 2.0**-20 * np.abs(scaled) + 1e-9)


@pytest.mark.parametrize("levels", LEVELS)
@settings(deadline=None, max_examples=15)
@given(problem=problems())
def test_the_body_is_the_reference(one_node: Any, nearest_levels: Any, levels: Any, problem: dict[str, Array]) -> None:
    zero = np.zeros((), levels)
    dtype, (total, scaled) = problem["x"].dtype, values(problem)
    outputs = {"sum": dtype, "quantized": levels}
    given_all = {name: np.asarray(value) for name, value in problem.items()} | {"zero_point": zero}
    graph = one_node("AddLayerNormQuantize", given_all, outputs, ("x", "residual"), epsilon=EPSILON)
    found = Session(graph).run({"x": problem["x"], "residual": problem["residual"]})
    np.testing.assert_array_equal(found["sum"], total)
    # ONNX Runtime goes on with the sum as it was before it was rounded to float16.
    sum_off = 2.0**-11 if dtype == np.float16 else 0.0
    nearest_levels(found["quantized"].view(levels), scaled, 0, bound(problem, total, scaled, sum_off))
    nearest_levels(reference(**given_all, epsilon=EPSILON)[1], scaled, 1e-6)  # E4M3 goes by way of float32


def test_rounding_is_to_even_and_saturates() -> None:
    one, zero = np.float32(1), np.zeros((), np.int8)
    x = np.float32([[4, 2, 4, 2]])  # 1 and -1 around its mean
    weight, bias = np.float32([2.5, 3.5, 1000, 1000]), np.float32([0, 0, 0, 2000])
    _, found = reference(x, 0 * x, weight, bias, one, zero, epsilon=0.0)
    assert found.tolist() == [[2, -4, 127, 127]]


@pytest.mark.parametrize(("dtype", "levels"), [(np.float16, np.int8), (np.float32, LEVELS[1])])
def test_an_engine_is_built_through_the_body(
    one_node: Any, builds: Any, dequantized: Any, dtype: Any, levels: Any
) -> None:
    given_all = {
        "x": np.zeros((1, 64), dtype),
        "residual": np.zeros((1, 64), dtype),
        "weight": np.ones(64, dtype),
        "bias": np.zeros(64, dtype),
        "scale": np.array(0.02, np.float32),
        "zero_point": np.zeros((), levels),
    }
    outputs = {"sum": dtype, "quantized": levels}
    graph = one_node("AddLayerNormQuantize", given_all, outputs, ("x", "residual"), epsilon=EPSILON)
    built = builds(dequantized(graph))
    assert "node" in {node for layer in built.layers for node in layer["nodes"]}


# The kernel, in Triton's interpreter, whose conversions to E4M3 and bfloat16 are not those of a GPU: int8 alone.


@settings(deadline=None, max_examples=15)
@given(problem=problems(), way=st.sampled_from(WAYS))
def test_the_kernel_is_the_reference(
    interpreter: Any, nearest_levels: Any, problem: dict[str, Array], way: str
) -> None:
    total, scaled = values(problem)
    outputs = {"total": (total.shape, total.dtype), "quantized": (total.shape, np.int8)}
    inputs = problem | {"scale": problem["scale"].reshape(1), "zero_point": np.zeros(1, np.int8)}
    columns = {"x": 1, "residual": 1} if way == "padded" else {}
    found = interpreter("add_layernorm_quantize", inputs, outputs, columns, way == "plugin", epsilon=EPSILON)
    np.testing.assert_array_equal(found["total"], total)
    nearest_levels(found["quantized"], scaled, 0, bound(problem, total, scaled))


def test_a_row_that_is_not_finite_leaves_the_others_alone(interpreter: Any, nearest_levels: Any) -> None:
    x = np.random.default_rng(0).standard_normal((3, 9)).astype(np.float32)
    x[1, 4] = np.nan
    problem = {"x": x, "residual": np.zeros_like(x), "weight": np.ones(9, np.float32), "bias": np.zeros(9, np.float32)}
    problem["scale"] = np.float32([0.02])
    zero_point = np.zeros(1, np.int8)
    outputs = {"total": (x.shape, x.dtype), "quantized": (x.shape, np.int8)}
    found = interpreter("add_layernorm_quantize", problem | {"zero_point": zero_point}, outputs, epsilon=EPSILON)
    np.testing.assert_array_equal(found["total"], x)
    total, scaled = (value[::2] for value in values(problem))
    nearest_levels(found["quantized"][::2], scaled, 0, bound(problem, total, scaled))
