"""What kernels are timed on and against; and on a GPU, that they are right and fast."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.graph import KERNELS, Array, Weights, specs

OPERATORS = sorted(path.parent.name for path in KERNELS.glob("*/bench.py"))
TOLERANCE = 2.0**-7
"""Of the largest value: float16 weights of a product are rounded before it or after, 2^-11 each, over thousands."""


def module(operator: str, name: str) -> ModuleType:
    pytest.importorskip("torch")
    return importlib.import_module(f"llmc.kernels.{operator}.{name}")


def compare(found: Any, expected: Any) -> None:
    """Levels may be the next one where a value lies between two; others are as near as their type."""
    import torch

    assert found.shape == expected.shape
    wide, right = found.double(), expected.double()
    levels = not expected.is_floating_point()
    assert torch.isfinite(wide).all()
    assert (wide - right).abs().max() <= (1 if levels else TOLERANCE * right.abs().max())
    if levels:
        assert (wide != right).double().mean() < 0.02  # 2^-11 of up to 127 levels, on either side of the boundaries


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_computes_the_body(operator: str, one_node: Any) -> None:
    """Whatever a kernel is timed against must compute the same: the body, in ONNX Runtime."""
    import torch

    torch.manual_seed(0)
    bench = module(operator, "bench")
    schema = next(s for s in specs().values() if s.__name__.split(".")[-2] == operator).SCHEMA
    shape = (3, *(64 for _ in bench.SHAPES[0][1:]))
    given, made = bench.inputs(*shape, "cpu"), bench.outputs(*shape, "cpu")
    arrays = {formal.name: stored(formal, given[formal.name].numpy()) for formal in schema.inputs}
    free = [name for name, array in arrays.items() if array.shape == (3, 64)]
    dtypes = {formal.name: value.numpy().dtype for formal, value in zip(schema.outputs, made.values(), strict=True)}
    graph = one_node(schema.name, arrays, dtypes, tuple(free), **bench.ATTRIBUTES)
    expected = Session(graph).run({name: arrays[name] for name in free})
    for right, found in zip(expected.values(), bench.in_torch(**given, **bench.ATTRIBUTES), strict=True):
        compare(found, torch.from_numpy(right))


def stored(formal: onnx.defs.OpSchema.FormalParameter, array: Array) -> Array | Weights:
    """What a kernel is given, as models hold it: scalars without an axis, and INT4 as such."""
    if formal.type_str == "tensor(int4)":
        dims = (len(array), array.shape[1] * 2)
        return Weights(onnx.TensorProto.INT4, dims, onnx.helper.make_tensor("", 22, dims, array.tobytes(), raw=True))
    return array.reshape(()) if array.shape == (1,) else array


@pytest.fixture
def cuda() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        pytest.skip("needs an NVIDIA GPU, and triton")


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_kernel_is_right_on_a_gpu(operator: str) -> None:
    """Fresh inputs each time, and outputs full of what no kernel writes."""
    bench, kernel = module(operator, "bench"), module(operator, "kernel")
    for shape in bench.SHAPES:
        for _ in range(3):
            given, made = bench.inputs(*shape, "cuda"), bench.outputs(*shape, "cuda")
            kernel.launch(**given, **made, **bench.ATTRIBUTES)
            for found, right in zip(made.values(), bench.in_torch(**given, **bench.ATTRIBUTES), strict=True):
                compare(found, right)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_kernel_is_fast_on_a_gpu(operator: str) -> None:
    """As the issue of kernels asks: no slower than torch.compile, and near a copy of as many bytes."""
    spec = importlib.util.spec_from_file_location("kernels_bench", Path(__file__).parents[1] / "bench" / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    slow = [
        (shape, found)
        for shape, found in bench.measured(operator)
        if found["over_torch"] > 1 or (found["ms"] > 0.02 and found["of_copy"] < 0.85)
    ]
    assert slow == []
