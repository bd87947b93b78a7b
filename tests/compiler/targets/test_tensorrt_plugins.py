"""Plugins as TensorRT is told of them; a stand-in listens, for TensorRT itself needs a GPU."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from llmc.compiler.targets import tensorrt_plugins
from llmc.compiler.targets.tensorrt_plugins import Size, for_parser, operators, without_scratch
from llmc.passes.base import Context
from llmc.passes.graph import Constant, Graph, Node, Variable, specs, to_model

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Expression:
    """A size as TensorRT has it: a symbol too, whose value is known here all the same. No numbers on the left."""

    def __init__(self, value: Any, is_constant: bool = True) -> None:
        self.value, self.is_constant = (
            getattr(value, "value", value),
            is_constant and getattr(value, "is_constant", True),
        )

    def constant_value(self) -> int:
        assert self.is_constant
        return int(self.value)

    def _with(self, value: int, other: Expression) -> Expression:
        return Expression(value, self.is_constant and other.is_constant)

    def __add__(self, other: Expression) -> Expression:
        return self._with(self.value + other.value, other)

    def __sub__(self, other: Expression) -> Expression:
        return self._with(self.value - other.value, other)

    def __mul__(self, other: Expression) -> Expression:
        return self._with(self.value * other.value, other)

    def __floordiv__(self, other: Expression) -> Expression:
        return self._with(self.value // other.value, other)


class TensorDesc(SimpleNamespace):
    @classmethod
    def of(cls, dtype: str, *sizes: int | str) -> TensorDesc:
        """A description; sizes in quotes are symbols."""
        shape = [Expression(int(size), not isinstance(size, str)) for size in sizes]
        return cls(shape_expr=shape, dtype=SimpleNamespace(name=dtype))


class Plugins(ModuleType):
    """What `tensorrt.plugin` is told."""

    TensorDesc, ShapeExpr, SymInt32 = TensorDesc, Expression, Expression
    KernelLaunchParams = SimpleNamespace

    class SymIntExprs(tuple[Any, ...]):
        from_tuple = classmethod(lambda cls, values: cls(values))

    def __init__(self) -> None:
        super().__init__("stand_in.plugin")
        self.described: dict[str, Callable[..., Any]] = {}
        self.compiled: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[..., Any]:
        return lambda function: self.described.setdefault(name, function)

    def aot_impl(self, name: str) -> Callable[..., Any]:
        return lambda function: self.compiled.setdefault(name, function)

    def from_shape_expr(self, shape: Sequence[Expression], dtype: Any) -> TensorDesc:
        return TensorDesc(shape_expr=shape, dtype=dtype)


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    pytest.importorskip("torch")
    told = Plugins()
    monkeypatch.setitem(__import__("sys").modules, "stand_in.plugin", told)
    tensorrt_plugins.register(ModuleType("stand_in"), 80)
    return told


@needs_triton
def test_every_operator_with_a_plugin_is_registered_with_the_inputs_of_its_schema(plugins: Plugins) -> None:
    assert set(plugins.described) == set(plugins.compiled) == {f"llmc::{name}" for name in operators()}
    assert set(operators()) <= set(specs())
    for name in operators():
        schema = specs()[name].SCHEMA
        names = [*(formal.name for formal in schema.inputs), *sorted(schema.attributes)]
        assert list(inspect.signature(plugins.described[f"llmc::{name}"]).parameters) == names
        more = [*names, "outputs", "tactic"]
        assert list(inspect.signature(plugins.compiled[f"llmc::{name}"]).parameters) == more


@needs_triton
def test_shapes_and_the_launch_are_those_of_the_tensors(plugins: Plugins) -> None:
    x, weight = TensorDesc.of("HALF", "3", "5", 500), TensorDesc.of("HALF", 500)
    inputs = (x, x, weight, TensorDesc.of("FLOAT"), TensorDesc.of("INT8"))
    outputs = plugins.described["llmc::AddRMSNormQuantize"](*inputs, epsilon=1e-5)
    assert [[size.value for size in tensor.shape_expr] for tensor in outputs] == [[3, 5, 500], [3, 5, 500]]
    assert [tensor.dtype.name for tensor in outputs] == ["HALF", "INT8"]

    name, ptx, launch, numbers = plugins.compiled["llmc::AddRMSNormQuantize"](*inputs, 1e-5, outputs, None)
    assert [number.value for number in numbers] == [500, 500, 500]
    assert (launch.grid_x.value, launch.grid_x.is_constant) == (15, False)
    assert (launch.block_x, launch.shared_mem) == (64, 8)  # docs/kernels.md: eight values a thread
    assert name == "add_rmsnorm_quantize"
    assert assembled(ptx) == [name]
    assert len(re.findall(r"\.param", ptx.partition("{")[0])) == len(inputs) + len(numbers) + len(outputs)


@needs_triton
def test_rows_of_a_size_that_is_not_fixed_are_refused(plugins: Plugins) -> None:
    x, weight = TensorDesc.of("HALF", 3, "500"), TensorDesc.of("HALF", "500")
    inputs = (x, x, weight, TensorDesc.of("FLOAT"), TensorDesc.of("INT8"))
    with pytest.raises(ValueError, match="a size that a kernel is compiled for is dynamic"):
        plugins.compiled["llmc::AddRMSNormQuantize"](*inputs, 1e-5, [x, x], None)


def assembled(ptx: str) -> list[str]:
    """The kernels in PTX, once NVIDIA's assembler takes it."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "ptxas"
    made = subprocess.run([tool, "-arch=sm_80", "-o", "/dev/null", "-"], input=ptx, text=True, capture_output=True)
    assert made.returncode == 0, made.stderr
    return re.findall(r"\.visible \.entry (\w+)", ptx)


PTX = """.visible .entry k(
	.param .u64 k_param_0,
	.param .u64 k_param_1,
	.param .u64 k_param_2
)
{
	ld.param.b64 	%rd1, [k_param_0];
	READ
	ret;
}"""


def test_arguments_that_tensorrt_knows_nothing_of_go() -> None:
    assert without_scratch(PTX, 1) == PTX.replace(",\n\t.param .u64 k_param_1,\n\t.param .u64 k_param_2", "")
    assert without_scratch(PTX, 3) == PTX


def test_a_kernel_that_reads_scratch_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="k reads its scratch memory"):
        without_scratch(PTX.replace("READ", "ld.param.b64 	%rd2, [k_param_2];"), 2)


def test_a_size_takes_numbers_on_either_side() -> None:
    size = Size(Expression(7), Expression)
    for made, value in ((2 + size, 9), (size - 3, 4), (3 * size, 21), (size // 2, 3), (size * size, 49)):
        assert int(made) == value


def test_the_parser_is_given_plugins_in_the_place_of_functions() -> None:
    x, y = Variable("x", np.dtype(np.float16), ["N", 32]), Variable("y", np.dtype(np.float16), ["N", 4])
    levels = np.arange(-8, 8).repeat(8).reshape(4, 32).astype(ml_dtypes.int4)
    weight = Constant("w", Context().keep(onnx.TensorProto.INT4, levels))
    scale = Constant("s", np.ones((4, 1), np.float16))
    graph = Graph([Node("DequantGemv", "n", {"block": 32}, [x, weight, scale], [y], domain="llmc")], [x], [y], opset=21)
    before = to_model(graph)
    made = for_parser(before)
    assert [function.name for function in before.functions] == ["DequantGemv"]
    assert not made.functions
    (node,) = made.graph.node
    assert (node.op_type, node.domain) == ("DequantGemv", "")
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert values == {"block": 32, "plugin_namespace": b"llmc"}
    stored = next(t for t in made.graph.initializer if t.name == "w")
    assert (stored.data_type, list(stored.dims)) == (onnx.TensorProto.INT8, [4, 16])
    pairs = onnx.numpy_helper.to_array(stored).view(np.uint8)
    np.testing.assert_array_equal(pairs & 15, levels.astype(np.int8)[:, 0::2] & 15)
    np.testing.assert_array_equal(pairs >> 4, levels.astype(np.int8)[:, 1::2] & 15)
