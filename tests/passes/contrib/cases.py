"""One node of an operator with random inputs: what the tests of contrib operators draw, build and compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from llmc.passes.graph import Array, Graph, from_model


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


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)
