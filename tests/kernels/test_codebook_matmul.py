from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.report.flops import count_flops
from llmc.compiler.report.statistics import layer_precision
from llmc.compiler.session import Session
from llmc.kernels.codebook_matmul.reference import pack, reference, unpack, weight
from llmc.passes.graph import Array, to_model

BITS = (2, 3, 4, 8)
EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, dict[str, Array]]:
    """Bits of an index, and inputs of small and odd sizes, with any number of codebooks that fits."""
    bits = draw(st.sampled_from(BITS))
    groups, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rows, depth = groups * draw(st.integers(1, 5)), blocks * draw(st.integers(1, 23))
    dtype = np.dtype(draw(st.sampled_from([np.float32, np.float16])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lead = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    return bits, {
        "x": rng.standard_normal((*lead, depth)).astype(dtype),
        "packed": pack(rng.integers(0, 1 << bits, (rows, depth)), bits),
        "codebook": rng.standard_normal((groups, blocks, 1 << bits)).astype(dtype),
    }


def bound(x: Array, packed: Array, codebook: Array, bits: int) -> Array:
    """Largest error of K products summed in float32, in any order, and rounded to the type of x."""
    size = reference(np.abs(x), packed, np.abs(codebook), bits=bits)
    return size * (x.shape[-1] * EPSILON["float32"] + EPSILON[x.dtype.name]) + 1e-7


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32))
def test_what_is_packed_can_be_unpacked(bits: int, rows: int, depth: int, seed: int) -> None:
    indices = np.random.default_rng(seed).integers(0, 1 << bits, (rows, depth))
    packed = pack(indices, bits)
    assert packed.shape == (rows, -(-depth // (32 // bits)))
    np.testing.assert_array_equal(unpack(packed, bits, depth), indices)


def test_a_weight_is_looked_up_in_the_codebook_of_its_rows_and_block() -> None:
    codebook = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    indices = np.random.default_rng(0).integers(0, 4, (4, 6))
    found = weight(pack(indices, 2), codebook, 2, 6)
    for n in range(4):
        for k in range(6):
            assert found[n, k] == codebook[n // 2, k // 2, indices[n, k]]


@settings(deadline=None, max_examples=60)
@given(problems())
def test_the_body_is_the_reference(one_node: Any, problem: tuple[int, dict[str, Array]]) -> None:
    bits, tensors = problem
    graph = one_node("CodebookMatMul", tensors, {"y": tensors["x"].dtype}, bits=bits)
    graph.inputs[0].shape = list(tensors["x"].shape)
    found = Session(graph).run({"x": tensors["x"]})["y"].astype(np.float64)
    assert (np.abs(found - reference(**tensors, bits=bits)) <= bound(**tensors, bits=bits)).all()


@pytest.mark.parametrize("opset", [15, 17, 20, 23, 25])
def test_it_is_valid_and_right_at_every_opset(one_node: Any, opset: int) -> None:
    rng = np.random.default_rng(opset)
    tensors = {
        "x": rng.standard_normal((3, 45)).astype(np.float32),
        "packed": pack(rng.integers(0, 8, (6, 45)), 3),
        "codebook": rng.standard_normal((3, 5, 8)).astype(np.float32),
    }
    graph = one_node("CodebookMatMul", tensors, {"y": np.float32}, opset=opset, bits=3)
    onnx.checker.check_model(to_model(graph), full_check=True)
    found = Session(graph).run({"x": tensors["x"]})["y"]
    assert (np.abs(found - reference(**tensors, bits=3)) <= bound(**tensors, bits=3)).all()


def tensors_of(bits: int, dtype: Any, rows: int = 32, depth: int = 60) -> dict[str, Array]:
    rng = np.random.default_rng(bits)
    return {
        "x": np.zeros((1, depth), dtype),
        "packed": pack(rng.integers(0, 1 << bits, (rows, depth)), bits),
        "codebook": rng.standard_normal((4, 3, 1 << bits)).astype(dtype),
    }


@pytest.mark.parametrize(
    ("bits", "dtype"), [(2, np.float16), (3, np.float32), (4, ml_dtypes.bfloat16), (8, np.float16)]
)
def test_an_engine_is_built_through_the_body(one_node: Any, builds: Any, bits: int, dtype: Any) -> None:
    built = builds(one_node("CodebookMatMul", tensors_of(bits, dtype), {"y": dtype}, bits=bits))
    products = [layer for layer in built.layers if layer["product"]]
    assert [(layer["nodes"], layer["product"]) for layer in products] == [(["node"], np.dtype(dtype).name)]


def test_reports_know_it_as_a_product(one_node: Any) -> None:
    graph = one_node("CodebookMatMul", tensors_of(4, np.float32), {"y": np.float32}, bits=4)
    assert count_flops(graph, {"batch": 8}) == (2 * 8 * 32 * 60, 0)
    assert [layer.found for layer in layer_precision(graph, {}, {})] == ["int4 weights"]


# The kernel, in Triton's interpreter. bfloat16 is left to the GPU: the interpreter multiplies its bits as integers.


@settings(deadline=None, max_examples=15)
@given(problems(), st.sampled_from([None, 1, 2, 3, "plugin"]))
def test_the_kernel_is_the_reference(
    interpreter: Any, problem: tuple[int, dict[str, Array]], columns: int | str | None
) -> None:
    bits, tensors = problem
    plugin, x = columns == "plugin", tensors["x"]
    x = x if plugin else x.reshape(-1, x.shape[-1])
    tensors = {**tensors, "x": x}
    outputs = {"y": ((*x.shape[:-1], len(tensors["packed"])), x.dtype)}
    strides = {"x": columns} if isinstance(columns, int) else {}
    found = interpreter("codebook_matmul", tensors, outputs, strides, plugin, bits=bits)["y"].astype(np.float64)
    assert (np.abs(found - reference(**tensors, bits=bits)) <= bound(**tensors, bits=bits)).all()


@pytest.mark.parametrize("shape", [(17, 70, 130), (33, 32, 64), (1, 1, 1)], ids=str)
def test_the_kernel_covers_several_tiles(interpreter: Any, shape: tuple[int, int, int]) -> None:
    rows, count, depth = shape
    rng = np.random.default_rng(0)
    tensors = {
        "x": rng.standard_normal((rows, depth)).astype(np.float32),
        "packed": pack(rng.integers(0, 16, (count, depth)), 4),
        "codebook": rng.standard_normal((1, 1, 16)).astype(np.float32),
    }
    found = interpreter("codebook_matmul", tensors, {"y": ((rows, count), np.float32)}, bits=4)["y"]
    assert (np.abs(found - reference(**tensors, bits=4)) <= bound(**tensors, bits=4)).all()


def test_the_kernel_keeps_special_values_to_their_rows(interpreter: Any) -> None:
    tensors = tensors_of(3, np.float32)
    x = np.random.default_rng(0).standard_normal((4, 60)).astype(np.float32)
    x[1, 7], x[2, 59] = np.nan, np.inf
    tensors = {**tensors, "x": x}
    found = interpreter("codebook_matmul", tensors, {"y": ((4, 32), np.float32)}, bits=3)["y"]
    expected = reference(**tensors, bits=3)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    assert np.isfinite(found[[0, 3]]).all()
