from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from llmc.compiler.session import Session
from llmc.kernels.dequant_gemv.reference import reference
from llmc.passes.base import Context
from llmc.passes.graph import Array, raw_values

EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
WAYS = ("contiguous", "padded", "plugin")
"""How inputs lie in memory; or without gaps, and launched as TensorRT launches a plugin."""


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, dict[str, Array]]:
    """A block, and inputs of 1 to 16 rows with any number of blocks and channels."""
    block = draw(st.sampled_from([16, 32, 64]))
    rows, count, blocks = draw(st.integers(1, 16)), draw(st.integers(1, 20)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return block, {
        "x": rng.standard_normal((rows, blocks * block)).astype(dtype),
        "weight": rng.integers(-8, 8, (count, blocks * block)).astype(ml_dtypes.int4),
        "scale": (rng.uniform(0.1, 1, (count, blocks)) / 8).astype(dtype),
    }


def bound(x: Array, weight: Array, scale: Array, block: int) -> Array:
    """Largest error of K products summed in float32, in any order, and rounded to the type of x; W is rounded twice
    where the body computes in float32 and the reference in the type of the scale."""
    size = reference(np.abs(x), np.abs(weight.astype(np.int8)), scale, block=block)
    return size * (x.shape[-1] * EPSILON["float32"] + 2 * EPSILON[x.dtype.name]) + 1e-7


@settings(deadline=None, max_examples=40)
@given(problems())
def test_the_body_is_the_reference(one_node: Any, problem: tuple[int, dict[str, Array]]) -> None:
    block, tensors = problem
    stored = tensors | {"weight": Context().keep(TensorProto.INT4, tensors["weight"])}
    graph = one_node("DequantGemv", stored, {"y": tensors["x"].dtype}, block=block)
    found = Session(graph).run({"x": tensors["x"]})["y"].astype(np.float64)
    assert (np.abs(found - reference(**tensors, block=block)) <= bound(**tensors, block=block)).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_an_engine_is_built_through_the_body(one_node: Any, builds: Any, dtype: Any) -> None:
    tensors = {
        "x": np.zeros((1, 64), dtype),
        "weight": Context().keep(TensorProto.INT4, np.ones((48, 64), ml_dtypes.int4)),
        "scale": np.ones((48, 2), dtype),
    }
    built = builds(one_node("DequantGemv", tensors, {"y": dtype}, block=32))
    products = [layer for layer in built.layers if layer["product"]]
    assert [layer["product"] for layer in products] == [np.dtype(dtype).name]


@settings(deadline=None, max_examples=8)
@given(problems(), st.sampled_from(WAYS))
def test_the_kernel_is_the_reference(interpreter: Any, problem: tuple[int, dict[str, Array]], way: str) -> None:
    """In Triton's interpreter, whose rounding to bfloat16 is not that of a GPU: float32 and float16."""
    block, tensors = problem
    weight = tensors["weight"]
    two_a_byte = np.frombuffer(raw_values(weight, 22), np.int8).reshape(len(weight), -1)  # as ONNX stores INT4
    outputs = {"y": ((len(tensors["x"]), len(weight)), tensors["x"].dtype)}
    columns = {"x": 1} if way == "padded" else {}
    given_all = tensors | {"weight": two_a_byte}
    found = interpreter("dequant_gemv", given_all, outputs, columns, way == "plugin", block=block)["y"]
    off = np.abs(found.astype(np.float64) - reference(**tensors, block=block))
    assert (off <= bound(**tensors, block=block)).all()
