"""Fixtures of the tests of passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, PassResult
from llmc.passes.convert_fp16 import ConvertFp16
from llmc.passes.graph import Array, Graph, onnx_dtype, to_model


@pytest.fixture(scope="session")
def convert() -> Callable[..., PassResult]:
    """Run convert-fp16 with activations measured on `feeds`, and check that what it leaves is valid."""

    def convert(
        graph: Graph, feeds: Mapping[str, Array] | None = None, stop_after: int | None = None, **settings: Any
    ) -> PassResult:
        activations = None if feeds is None else SampledActivations([feeds])
        result = ConvertFp16(**settings).run(graph, Context(Ledger(stop_after), activations))
        onnx.checker.check_model(to_model(graph), full_check=True)
        casts = [node for node in graph.nodes if node.op == "Cast"]
        assert not any(onnx_dtype(c.inputs[0]) == onnx_dtype(c.outputs[0]) for c in casts), "a Cast that does nothing"
        ends = [(id(c.inputs[0]), c.attrs["to"]) for c in casts]
        assert len(set(ends)) == len(ends), "two Casts that do the same"
        return result

    return convert


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Assert that a graph's outputs are within so many float16 roundings of the largest expected value."""

    def close(graph: Graph, feeds: Mapping[str, Array], expected: Mapping[str, Array], roundings: int) -> None:
        found = Session(graph).run(feeds)
        for name, value in expected.items():
            bound = roundings * 2.0**-11 * max(float(np.max(np.abs(value), initial=0)), 1.0)
            np.testing.assert_allclose(found[name].astype(np.float64), value.astype(np.float64), rtol=0, atol=bound)

    return close


@pytest.fixture(scope="session")
def half_operators() -> Callable[[Graph], set[str]]:
    """Operators with a float16 tensor, Casts left out."""

    def half_operators(graph: Graph) -> set[str]:
        return {
            node.op
            for node in graph.nodes
            if node.op != "Cast" and any(t.dtype == np.float16 for t in (*node.inputs, *node.outputs) if t.name)
        }

    return half_operators
