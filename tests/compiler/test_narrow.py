"""What ONNX Runtime has no kernels for must compute what ONNX says, by its reference evaluator and by ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto

from llmc.compiler.session import Session
from llmc.passes.graph import Constant, Graph, Variable, from_model, to_model

E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)


def graph_of(nodes: list[onnx.NodeProto], constants: dict[str, Any], shape: list[object], dtype: int = 1) -> Graph:
    x, y = (onnx.helper.make_tensor_value_info(name, dtype, shape) for name in "xy")
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [x], [y], initializers),
        opset_imports=[onnx.helper.make_opsetid("", 24)],
        ir_version=11,
    )
    return from_model(model)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(op, inputs, [output], output, **attributes)


def test_every_kind_of_value_rounds_to_4_bits_as_ml_dtypes_does() -> None:
    """Through Cast, and through QuantizeLinear by a scale of 1."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    around = np.concatenate([np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(9))])
    values = np.concatenate([around, -around, np.linspace(-8, 8, 321, dtype=np.float32), [0, 1e-30, 1e30, -1e30]])
    values = values.astype(np.float32)
    expected = np.clip(values, -6, 6).astype(E2M1).astype(np.float32)
    cast = graph_of([node("Cast", ["x"], "q", to=TensorProto.FLOAT4E2M1), node("Cast", ["q"], "y", to=1)], {}, ["N"])
    np.testing.assert_array_equal(Session(cast).run({"x": values})["y"], expected)
    quantize = graph_of(
        [
            node("QuantizeLinear", ["x", "s"], "q", output_dtype=TensorProto.FLOAT4E2M1),
            node("DequantizeLinear", ["q", "s"], "y"),
        ],
        {"s": np.array(1, np.float32)},
        ["N"],
    )
    np.testing.assert_array_equal(Session(quantize).run({"x": values})["y"], expected)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_blocks_run_along_any_axis(axis: int, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 48)).astype(dtype)
    shape = [32, 48]
    shape[axis] //= 16
    scale, zero = np.exp2(rng.integers(-3, 3, shape)).astype(dtype), np.zeros(shape, E2M1)
    attributes = {"axis": axis, "block_size": 16}
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], "q", **attributes),
        node("DequantizeLinear", ["q", "s", "z"], "y", **attributes),
    ]
    graph = graph_of(nodes, {"s": scale, "z": zero}, [32, 48], onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    (expected,) = onnx.reference.ReferenceEvaluator(to_model(graph)).run(None, {"x": x})
    np.testing.assert_array_equal(Session(graph).run({"x": x})["y"], expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_scales_that_are_powers_of_two(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 64)).astype(dtype)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    scale = np.exp2(rng.integers(-6, 3, (4, 2))).astype(ml_dtypes.float8_e8m0fnu)
    nodes = [
        node("QuantizeLinear", ["x", "s"], "q", axis=-1, block_size=32, output_dtype=TensorProto.FLOAT8E4M3FN),
        node("DequantizeLinear", ["q", "s"], "y", axis=-1, block_size=32, output_dtype=kind),
    ]
    graph = graph_of(nodes, {"s": scale}, [4, 64], kind)
    (expected,) = onnx.reference.ReferenceEvaluator(to_model(graph)).run(None, {"x": x})
    np.testing.assert_array_equal(Session(graph).run({"x": x})["y"], expected)


def test_the_graph_itself_is_left_as_it_is() -> None:
    values = np.arange(8, dtype=np.float32).astype(E2M1)
    graph = graph_of(
        [node("DequantizeLinear", ["w", "s"], "d"), node("Add", ["x", "d"], "y")],
        {"w": values, "s": np.array(0.5, np.float32)},
        [8],
    )
    Session(graph).run({"x": np.zeros(8, np.float32)})
    assert graph.tensors()["w"].dtype == E2M1
    assert isinstance(graph.tensors()["w"], Constant)
    assert isinstance(graph.tensors()["d"], Variable)
