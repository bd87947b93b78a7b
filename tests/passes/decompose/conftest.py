"""One node of an operator with random inputs: what the tests of contrib operators draw, build and compare.

The truth is ONNX Runtime's own kernel of the operator, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Pass, PassResult
from llmc.passes.graph import Array, Graph, copy_graph, from_model, to_model


@dataclass
class Case:
    """`inputs` by position, None where left out; those at `constants` become initializers."""

    op: str
    inputs: list[Array | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[bool, ...] = (True,)
    """Which outputs the node has, by position."""
    constants: frozenset[int] = frozenset()
    domain: str = "com.microsoft"
    types: tuple[int, ...] = ()
    """Types of the outputs that the node has; that of the first input where left out."""

    @property
    def feeds(self) -> dict[str, Array]:
        return {f"x{i}": v for i, v in enumerate(self.inputs) if v is not None and i not in self.constants}

    def graph(self, opset: int = 21, *, symbolic: bool = False) -> Graph:
        """A graph of this node alone; `symbolic`: with a named first dimension."""
        given = [f"x{i}" if value is not None else "" for i, value in enumerate(self.inputs)]
        made = [f"y{i}" if there else "" for i, there in enumerate(self.outputs)]
        node = onnx.helper.make_node(self.op, given, made, "node", domain=self.domain, **self.attributes)
        arrays = {name: value for name, value in zip(given, self.inputs, strict=True) if value is not None}
        type_of = {name: onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in arrays.items()}
        constants = {f"x{i}" for i in self.constants}
        infos = []
        for name in arrays.keys() - constants:
            shape: list[Any] = list(arrays[name].shape)
            if symbolic and len(shape) > 1:
                shape[0] = f"{name}_0"
            infos.append(onnx.helper.make_tensor_value_info(name, type_of[name], shape))
        there = [name for name in made if name]
        types = self.types or (next(iter(type_of.values())),) * len(there)
        graph = onnx.helper.make_graph(
            [node],
            "g",
            sorted(infos, key=lambda info: info.name),
            [onnx.helper.make_tensor_value_info(n, t, None) for n, t in zip(there, types, strict=True)],
            [onnx.numpy_helper.from_array(arrays[name], name) for name in arrays if name in constants],
        )
        imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
        return from_model(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10))


@pytest.fixture(scope="session")
def one_node() -> type[Case]:
    """The class of cases: `one_node("BiasGelu", [x, bias])`."""
    return Case


@pytest.fixture(scope="session")
def decomposed() -> Callable[..., tuple[Graph, PassResult]]:
    """Run a pass on a case; the graph after it must be standard, and give what the node gave.

    `tolerance` is relative to the largest value of an output; `read` cuts an output to what the operator defines of it.
    """

    def decomposed(
        case: Case,
        pass_class: type[Pass],
        tolerance: float,
        opset: int = 21,
        *,
        symbolic: bool = False,
        read: Callable[[str, Array], Array] = lambda _, values: values,
    ) -> tuple[Graph, PassResult]:
        graph = case.graph(opset, symbolic=symbolic)
        before = Session(graph).run(case.feeds)
        after = copy_graph(graph)
        result = pass_class().run(after, Context())
        assert len(result.rewrites) == 1, [miss.reason for miss in result.near_misses]
        assert all(not node.domain for node in after.nodes)
        onnx.checker.check_model(to_model(after))
        found = Session(after).run(case.feeds)
        for name, expected in before.items():
            assert found[name].dtype == expected.dtype
            assert found[name].shape == expected.shape
            wanted, got = (read(name, v).astype(np.float64) for v in (expected, found[name]))
            largest = max(1.0, float(np.abs(wanted).max(initial=0)))
            assert np.allclose(got, wanted, rtol=0, atol=tolerance * largest), (case, name)
        return after, result

    return decomposed
