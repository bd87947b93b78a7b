"""Graphs of one operator of llmc's own, and what a GPU kernel needs in order to be run or compiled without a GPU."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.targets import BuildRequest, Built, Range
from llmc.compiler.targets.tensorrt import TensorRT
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.graph import Array, Constant, Graph, Node, Tensor, Variable, save_model

OneNode = Callable[..., Graph]


@pytest.fixture(scope="session")
def one_node() -> OneNode:
    """A graph of one node of domain `llmc`: `given` arrays by input, of which all but `inputs` are constants.

    Outputs, name → dtype, have the rank of the first input.
    """

    def one_node(
        operator: str,
        given: Mapping[str, Array],
        outputs: Mapping[str, Any],
        inputs: tuple[str, ...] = ("x",),
        opset: int = 21,
        **attributes: Any,
    ) -> Graph:
        tensors: dict[str, Tensor] = {}
        for name, array in given.items():
            free = ["batch", *array.shape[1:]]
            tensors[name] = Variable(name, array.dtype, free) if name in inputs else Constant(name, array)
        rank = next(iter(given.values())).ndim
        made = [Variable(name, np.dtype(dtype), [None] * rank) for name, dtype in outputs.items()]
        node = Node(operator, "node", attributes, tensors.values(), made, domain="llmc")
        graph = Graph([node], [tensors[name] for name in inputs], made, opset=opset, ir_version=11)
        graph.import_domains = []
        return graph

    return one_node


class Interpreter:
    """Runs kernels in Triton's interpreter, in a process of its own (see interpreter.py)."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def __call__(
        self,
        operator: str,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, tuple[Sequence[int], Any]],
        columns: Mapping[str, int] | None = None,
        plugin: bool = False,
        **attributes: Any,
    ) -> dict[str, Array]:
        """What `kernels/<operator>/kernel.py` writes to `outputs`: name → shape and dtype.

        `columns`: input → how many elements apart its columns are, and its rows one further. `plugin`: as TensorRT
        launches it.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump((operator, dict(inputs), dict(outputs), columns or {}, attributes, plugin), self.process.stdin)
        self.process.stdin.flush()
        result = pickle.load(self.process.stdout)
        assert not isinstance(result, str), result
        return result  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    pytest.importorskip("torch")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    program = Path(__file__).with_name("interpreter.py")
    with subprocess.Popen([sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Interpreter(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def builds(tmp_path: Path) -> Callable[[Graph], Built]:
    """Check a graph for TensorRT-RTX, build its engine for SM89, and say what is known about it."""
    missing = availability("tensorrt-rtx").missing
    if missing:
        pytest.skip(missing)

    def builds(graph: Graph) -> Built:
        request, target = BuildRequest([{"batch": Range(1, 2, 8)}], (89,)), TensorRT("tensorrt-rtx")
        assert target.check(graph, request) == []
        save_model(graph, tmp_path / "model.onnx")
        folder = tmp_path / "engine"
        folder.mkdir()
        return target.build(tmp_path / "model.onnx", folder, request, lambda _: None)

    return builds


@pytest.fixture(scope="session")
def nearest_levels() -> Callable[..., None]:
    """Assert that each level is a nearest one to its value, itself known to `relative` parts of it, and saturated.

    Besides those parts a value may be off by `absolute`.
    """

    def nearest_levels(levels: Array, values: Array, relative: float, absolute: Array | float = 1e-9) -> None:
        largest = 127.0 if levels.dtype == np.int8 else 448.0
        wanted = np.clip(values, -128 if levels.dtype == np.int8 else -largest, largest)
        # int8: half a step. E4M3: half of the last of three bits, and half of 2^-9 among subnormal numbers.
        step = 0.5 if levels.dtype == np.int8 else np.maximum(np.abs(wanted) * 2.0**-4, 2.0**-10)
        off = np.abs(levels.astype(np.float64) - wanted)
        assert (off <= step + np.abs(values) * relative + absolute).all(), off.max()

    return nearest_levels


@pytest.fixture(scope="session")
def dequantized() -> Callable[[Graph], Graph]:
    """The graph with its last output, 8 bits wide, dequantized by the scale and zero point of its one node."""

    def dequantized(graph: Graph) -> Graph:
        (node,), quantized = graph.nodes, graph.outputs[-1]
        scale, zero = node.inputs[-2:]
        y = Variable("y", np.dtype(np.float32), quantized.shape)
        graph.nodes.append(Node("DequantizeLinear", "dequantize", {}, [quantized, scale, zero], [y]))
        graph.outputs[-1] = y
        return graph

    return dequantized
