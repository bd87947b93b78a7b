from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from llmc.passes.graph import Constant, Graph, Variable, from_model, load_values, to_model


@pytest.fixture(scope="session")
def in_float16() -> Callable[[Graph], Graph]:
    """The graph with every float32 tensor in float16: ONNX text has no numbers of that type."""

    def in_float16(graph: Graph) -> Graph:
        for tensor in graph.tensors().values():
            if isinstance(tensor, Variable) and tensor.dtype == np.float32:
                tensor.dtype = np.dtype(np.float16)
            elif isinstance(tensor, Constant) and tensor.dtype == np.float32:
                tensor.values = load_values(tensor).astype(np.float16)
        return from_model(to_model(graph))

    return in_float16
