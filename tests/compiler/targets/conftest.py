"""Graphs for the tests of targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx.parser
import pytest

from llmc.passes.graph import Constant, Graph, from_model

DOMAINS = ', "my.domain": 1, "com.microsoft": 1, "trt": 1'


@pytest.fixture(scope="session")
def graph_of() -> Callable[..., Graph]:
    """ONNX text → Graph, unchecked, any domain; names that the text leaves undeclared are `constants`."""

    def graph_of(text: str, opset: int = 23, **constants: Any) -> Graph:
        graph = from_model(onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": {opset}{DOMAINS}]> g {text}'))
        for name, values in constants.items():
            old, new = graph.tensors()[name], Constant(name, np.asarray(values))
            for node in list(old.outputs):
                node.inputs = [new if tensor is old else tensor for tensor in node.inputs]
        return graph

    return graph_of
