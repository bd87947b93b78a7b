"""Quantized operators, of ONNX and of com.microsoft."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.decompose.decompose_quantized import DecomposeQuantized
from llmc.passes.graph import Array, to_model

LEVEL = 1.01 / 255
"""One level of the output: integer kernels requantize by a product of scales that they round beforehand."""
FLOAT = 2e-5
"""float32 sums in another order."""
Rng = np.random.Generator


def normal(rng: Rng, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def levels(rng: Rng, dtype: Any, *shape: int) -> Array:
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def grid(rng: Rng, dtype: Any, many: int | None = None) -> list[Array]:
    """Scale and zero point, for all or for each of `many`."""
    if many is not None and rng.random() < 0.5:
        return [rng.uniform(0.01, 0.05, many).astype(np.float32), levels(rng, dtype, many)]
    return [np.array(rng.uniform(0.01, 0.2), np.float32), levels(rng, dtype, 1)[0].reshape(())]


def either(rng: Rng) -> Any:
    return [np.uint8, np.int8][rng.integers(2)]


def kind(dtype: Any) -> tuple[int, ...]:
    return (int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),)


def qlinear_matmul(rng: Rng) -> dict[str, Any]:
    dtype, n = either(rng), int(rng.integers(1, 6))
    inputs = [levels(rng, dtype, 2, 3, 4), *grid(rng, dtype), levels(rng, dtype, 4, n), *grid(rng, dtype, n)]
    output = [np.array(0.3, np.float32), levels(rng, dtype, 1).reshape(())]
    return {"op": "QLinearMatMul", "inputs": [*inputs, *output], "domain": "", "types": kind(dtype)}


def qlinear_conv(rng: Rng) -> dict[str, Any]:
    dtype, weight = [(np.uint8, np.uint8), (np.uint8, np.int8), (np.int8, np.int8)][rng.integers(3)]
    scale = grid(rng, weight, 6)
    if scale[1].ndim:
        scale[1] = np.full(6, 3, weight)
    bias = rng.integers(-500, 500, 6).astype(np.int32) if rng.random() < 0.5 else None
    inputs = [levels(rng, dtype, 2, 4, 5, 5), *grid(rng, dtype), levels(rng, weight, 6, 2, 3, 3), *scale]
    output = [np.array(0.5, np.float32), levels(rng, dtype, 1).reshape(()), bias]
    attributes = {"group": 2, "pads": [1, 1, 0, 0], "strides": [2, 1]}
    return {
        "op": "QLinearConv",
        "inputs": [*inputs, *output],
        "attributes": attributes,
        "domain": "",
        "types": kind(dtype),
    }


def qlinear_pair(rng: Rng) -> dict[str, Any]:
    dtype = either(rng)
    inputs = [levels(rng, dtype, 2, 3, 4), *grid(rng, dtype), levels(rng, dtype, 3, 1), *grid(rng, dtype)]
    op = str(rng.choice(["QLinearAdd", "QLinearMul"]))
    return {"op": op, "inputs": [*inputs, *grid(rng, dtype)], "types": kind(dtype)}


def qlinear_unary(rng: Rng) -> dict[str, Any]:
    dtype = either(rng)
    x, attributes, output = levels(rng, dtype, 2, 6, 6, 4), {}, grid(rng, dtype)
    op = str(rng.choice(["Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool"]))
    if op == "Softmax":
        attributes = {"opset": 13, "axis": int(rng.integers(4))}
        output = [np.array(1 / 256, np.float32), np.array(np.iinfo(dtype).min, dtype)]
    elif op == "LeakyRelu":
        attributes = {"alpha": 0.2}
    elif op == "AveragePool":
        attributes = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": int(rng.integers(2))}
    if op.endswith("Pool"):
        attributes["channels_last"] = int(rng.integers(2))
    inputs = [x, *grid(rng, dtype), *output]
    return {"op": f"QLinear{op}", "inputs": inputs, "attributes": attributes, "types": kind(dtype)}


def qlinear_many(rng: Rng) -> dict[str, Any]:
    dtype = either(rng)
    a, b = [levels(rng, dtype, 2, 3), *grid(rng, dtype)], [levels(rng, dtype, 2, 3), *grid(rng, dtype)]
    if rng.random() < 0.5:
        attributes = {"axis": int(rng.integers(2))}
        inputs = [*grid(rng, dtype), *a, *b]
        return {"op": "QLinearConcat", "inputs": inputs, "attributes": attributes, "types": kind(dtype)}
    condition = rng.integers(0, 2, (2, 3)).astype(bool)
    return {"op": "QLinearWhere", "inputs": [condition, *a, *b, *grid(rng, dtype)], "types": kind(dtype)}


def qgemm(rng: Rng) -> dict[str, Any]:
    dtype = either(rng)
    turned = {name: int(rng.integers(2)) for name in ("transA", "transB")}
    a, b = levels(rng, dtype, 3, 4), levels(rng, dtype, 4, 5)
    inputs: list[Any] = [a.T.copy() if turned["transA"] else a, *grid(rng, dtype)]
    inputs += [b.T.copy() if turned["transB"] else b, *grid(rng, dtype, 5)]
    inputs.append(rng.integers(-500, 500, 5).astype(np.int32) if rng.random() < 0.5 else None)
    output = [np.array(0.3, np.float32), levels(rng, dtype, 1).reshape(())]
    return {"op": "QGemm", "inputs": [*inputs, *output], "attributes": turned, "types": kind(dtype)}


def max_pool(rng: Rng) -> dict[str, Any]:
    dtype = either(rng)
    attributes = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    return {"op": "NhwcMaxPool", "inputs": [levels(rng, dtype, 2, 6, 6, 4)], "attributes": attributes}


def quantize(rng: Rng) -> dict[str, Any]:
    dtype = [np.uint8, np.int8, np.uint16, np.int16][rng.integers(4)]
    zero = np.array(rng.integers(0, 100), dtype)
    return {
        "op": "QuantizeLinear",
        "inputs": [normal(rng, 2, 3), np.array(0.1, np.float32), zero],
        "types": kind(dtype),
    }


ROUNDED = (qlinear_matmul, qlinear_conv, qlinear_pair, qlinear_unary, qlinear_many, qgemm, max_pool, quantize)


@pytest.mark.parametrize("draw", ROUNDED)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), opset=st.sampled_from([13, 21]))
def test_gives_the_levels_of_onnx_runtime(draw: Any, seed: int, opset: int, one_node: Any, decomposed: Any) -> None:
    case = one_node(**draw(np.random.default_rng(seed)))
    decomposed(case, DecomposeQuantized, LEVEL, opset, read=lambda _, values: values / 255)


def matmul_integer_to_float(rng: Rng) -> dict[str, Any]:
    dtype, (b_scale, b_zero) = either(rng), grid(rng, np.int8, 5)
    scale, zero = grid(rng, dtype)
    inputs = [levels(rng, dtype, 2, 3, 4), levels(rng, np.int8, 4, 5), scale, b_scale, zero, b_zero]
    inputs.append(normal(rng, 5))
    kept = inputs[: int(rng.choice([4, 6, 7]))]
    return {"op": "MatMulIntegerToFloat", "inputs": kept, "types": (1,)}


def dynamic_matmul(rng: Rng) -> dict[str, Any]:
    dtype = either(rng)
    inputs = [normal(rng, 2, 3, 4), levels(rng, dtype, 4, 5), *grid(rng, dtype, 5)]
    return {"op": "DynamicQuantizeMatMul", "inputs": [*inputs, normal(rng, 5)] if rng.random() < 0.5 else inputs}


def dequantize(rng: Rng) -> dict[str, Any]:
    dtype = either(rng)
    inputs = [levels(rng, dtype, 2, 3), normal(rng, 2), levels(rng, dtype, 2)]
    return {"op": "DequantizeLinear", "inputs": inputs, "attributes": {"axis": 0}, "types": (1,)}


def n_bits(rng: Rng) -> dict[str, Any]:
    bits, depth, rows, block = int(rng.choice([2, 4, 8])), int(rng.choice([64, 40, 32])), int(rng.integers(1, 7)), 32
    blocks = -(-depth // block)
    middle = 1 << (bits - 1)
    near = np.clip(rng.integers(-2, 3, (rows, blocks)) + middle, 0, 2 * middle - 1)
    packed = np.zeros((rows, -(-blocks * bits // 8)), np.uint8)
    for i in range(blocks):
        packed[:, i * bits // 8] |= (near[:, i] << (i * bits % 8)).astype(np.uint8)
    weights = levels(rng, np.uint8, rows, blocks, block * bits // 8)
    if bits == 8:
        weights = np.clip(weights, 3, 250).astype(np.uint8)
    zeros = [None, packed, near.astype(np.float32)][rng.integers(3 if bits < 8 else 2)]
    inputs = [normal(rng, 2, 3, depth), weights, np.abs(normal(rng, rows, blocks)), zeros, None]
    inputs.append(normal(rng, rows) if rng.random() < 0.5 else None)
    return {
        "op": "MatMulNBits",
        "inputs": inputs,
        "attributes": {"K": depth, "N": rows, "bits": bits, "block_size": block},
        "constants": frozenset({1, 2, 3} if zeros is not None else {1, 2}),
    }


def gather_blocks(rng: Rng) -> dict[str, Any]:
    indices, scales = rng.integers(0, 9, (2, 3)).astype(np.int64), np.abs(normal(rng, 9, 2))
    four = [ml_dtypes.int4, ml_dtypes.uint4][rng.integers(2)]
    plain = [rng.integers(0, 8, (9, 64)).astype(four), indices, scales, rng.integers(0, 8, (9, 2)).astype(four)]
    packed = [levels(rng, np.uint8, 9, 32), indices, scales, levels(rng, np.uint8, 9, 1)]
    inputs: list[Any] = plain if rng.random() < 0.5 else packed
    if rng.random() < 0.3:
        inputs[3] = None
    return {
        "op": "GatherBlockQuantized",
        "inputs": inputs,
        "attributes": {"bits": 4, "block_size": 32},
        "constants": frozenset({0, 2, 3} if inputs[3] is not None else {0, 2}),
        "types": (1,),
    }


def quantized_embedding(rng: Rng) -> dict[str, Any]:
    dtype = either(rng)
    ids = [rng.integers(0, n, (2, 4)).astype(np.int32) for n in (9, 2)]
    tables = [levels(rng, dtype, *shape) for shape in ((9, 8), (12, 8), (2, 8), (8,), (8,))]
    scales = [np.array(rng.uniform(0.01, 0.05), np.float32) for _ in tables]
    zeros = [np.array(3, dtype) for _ in tables]
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], np.int32)
    inputs = [*ids, *tables, mask, *scales, *zeros]
    return {"op": "QEmbedLayerNormalization", "inputs": inputs, "outputs": (True, True), "types": (1, 6)}


FLOATING = (matmul_integer_to_float, dynamic_matmul, dequantize, n_bits, gather_blocks, quantized_embedding)


@pytest.mark.parametrize("draw", FLOATING)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1))
def test_gives_the_numbers_of_onnx_runtime(draw: Any, seed: int, one_node: Any, decomposed: Any) -> None:
    decomposed(one_node(**draw(np.random.default_rng(seed))), DecomposeQuantized, FLOAT)


def integer_product(rng: Rng) -> dict[str, Any]:
    dtype, columns = either(rng), int(rng.integers(1, 5))
    a, b = [levels(rng, dtype, 2, 3, 40), levels(rng, np.int8, 40, columns)], [levels(rng, dtype, 1).reshape(())]
    b.append(levels(rng, np.int8, columns) if rng.random() < 0.5 else levels(rng, np.int8, 1).reshape(()))
    kept = [*a, *b][: int(rng.choice([2, 3, 4]))]
    return {"op": "MatMulInteger", "inputs": kept, "domain": "", "types": (6,)}


def integer_convolution(rng: Rng) -> dict[str, Any]:
    inputs = [levels(rng, np.uint8, 2, 4, 5, 5), levels(rng, np.uint8, 6, 2, 3, 3)]
    inputs += [levels(rng, np.uint8, 1).reshape(()), levels(rng, np.uint8, 1).reshape(())]
    attributes = {"group": 2, "pads": [1, 1, 0, 0]}
    return {"op": "ConvInteger", "inputs": inputs, "attributes": attributes, "domain": "", "types": (6,)}


@pytest.mark.parametrize("draw", [integer_product, integer_convolution])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1))
def test_integers_are_exact(draw: Any, seed: int, one_node: Any, decomposed: Any) -> None:
    decomposed(one_node(**draw(np.random.default_rng(seed))), DecomposeQuantized, 0)


@pytest.mark.parametrize("x", [[[1.0, -2.0, 3.0]], [[1.0, 2.0]], [[-1.0, -0.5]], [[0.0, 0.0]]])
def test_dynamic_quantization(x: Any, one_node: Any, decomposed: Any) -> None:
    case = one_node(
        "DynamicQuantizeLinear",
        [np.array(x, np.float32)],
        {},
        (True, True, True),
        domain="",
        types=(2, 1, 2),
    )
    decomposed(case, DecomposeQuantized, 1e-7)


def test_a_mean_that_the_cpu_has_no_kernel_for(one_node: Any) -> None:
    """QLinearReduceMean, as its documentation says: dequantize, mean, quantize."""
    rng = np.random.default_rng(0)
    x, scale, zero = levels(rng, np.uint8, 2, 5, 3), np.array(0.1, np.float32), np.array(7, np.uint8)
    inputs = [x, scale, zero, np.array(0.05, np.float32), np.array(9, np.uint8)]
    case = one_node("QLinearReduceMean", inputs, {"axes": [1], "keepdims": 1}, types=(2,))
    graph = case.graph(21)
    assert len(DecomposeQuantized().run(graph, Context()).rewrites) == 1
    mean = ((x.astype(np.float64) - 7) * 0.1).mean(axis=1, keepdims=True)
    expected = np.clip(np.rint(mean / 0.05) + 9, 0, 255)
    assert np.abs(Session(graph).run(case.feeds)["y0"].astype(np.float64) - expected).max() <= 1


RNG = np.random.default_rng(0)
LEAVES_ALONE = {
    "sums beyond what float32 holds": (
        {
            "op": "MatMulInteger",
            "inputs": [levels(RNG, np.uint8, 2, 400), levels(RNG, np.int8, 400, 2)],
            "domain": "",
            "types": (6,),
        },
        "its sums may reach 26010000, float32 is exact to 16777216",
    ),
    "a zero point for each row": (
        {
            "op": "MatMulInteger",
            "inputs": [levels(RNG, np.uint8, 2, 4), levels(RNG, np.int8, 4, 2), levels(RNG, np.uint8, 2)],
            "domain": "",
            "types": (6,),
        },
        "it has a zero point for each row",
    ),
    "an old Softmax over several axes": (
        {
            "op": "QLinearSoftmax",
            "inputs": [levels(RNG, np.uint8, 2, 3, 4), *grid(RNG, np.uint8), *grid(RNG, np.uint8)],
            "attributes": {"opset": 12, "axis": 1},
            "types": (2,),
        },
        "it is Softmax of opset 12 over more than the last axis",
    ),
    "a weight that is computed": (
        {
            "op": "MatMulNBits",
            "inputs": [normal(RNG, 2, 32), levels(RNG, np.uint8, 2, 1, 16), np.ones((2, 1), np.float32)],
            "attributes": {"K": 32, "N": 2, "bits": 4, "block_size": 32},
        },
        "'x1' is not a constant",
    ),
    "8 bits far from their zero point": (
        {
            "op": "MatMulNBits",
            "inputs": [
                normal(RNG, 2, 32),
                levels(RNG, np.uint8, 2, 1, 32),
                np.ones((2, 1), np.float32),
                np.zeros((2, 1), np.uint8),
            ],
            "attributes": {"K": 32, "N": 2, "bits": 8, "block_size": 32},
            "constants": frozenset({1, 2, 3}),
        },
        "beyond int8",
    ),
    "16-bit factors": (
        {
            "op": "MatMulInteger16",
            "inputs": [levels(RNG, np.int16, 2, 4), levels(RNG, np.int16, 4, 2)],
            "types": (6,),
        },
        "no standard operator has 16-bit factors",
    ),
}


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, one_node: Any) -> None:
    case, reason = LEAVES_ALONE[name]
    graph = one_node(**case).graph(21)
    before = to_model(graph)
    result = DecomposeQuantized().run(graph, Context())
    assert result.rewrites == []
    assert to_model(graph).graph.node == before.graph.node
    assert [reason in miss.reason for miss in result.near_misses] == [True]
