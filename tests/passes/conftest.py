"""Fixtures of the tests of passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, Pass, PassResult
from llmc.passes.graph import Array, Graph, copy_graph, onnx_dtype, to_model
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.precision.convert_half import ConvertHalf


@pytest.fixture(scope="session")
def convert() -> Callable[..., PassResult]:
    """Run convert-fp16, or another `kind` of it, with activations of `feeds`; what it leaves must be valid."""

    def convert(
        graph: Graph,
        feeds: Mapping[str, Array] | None = None,
        stop_after: int | None = None,
        kind: type[ConvertHalf] = ConvertFp16,
        **settings: Any,
    ) -> PassResult:
        activations = None if feeds is None else SampledActivations([feeds])
        before = {node.name for node in graph.nodes}
        result = kind(**settings).run(graph, Context(Ledger(stop_after), activations))
        onnx.checker.check_model(to_model(graph), full_check=True)
        casts = [node for node in graph.nodes if node.op == "Cast"]
        assert not any(onnx_dtype(c.inputs[0]) == onnx_dtype(c.outputs[0]) for c in casts), "a Cast that does nothing"
        ends = [(id(c.inputs[0]), c.attrs["to"]) for c in casts]
        assert len(set(ends)) == len(ends), "two Casts that do the same"
        new = [cast for cast in casts if cast.name not in before]
        assert not [cast for cast in new if any(n.op == "Cast" for n in cast.outputs[0].outputs)], "there and back"
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


@pytest.fixture(scope="session")
def fires(parse: Any, random_feeds: Any) -> Callable[..., PassResult]:
    """Run a pass on ONNX text; what is left must be just these operators, and compute what the graph computed."""

    def fires(step: Pass, text: str, operators: list[str], opset: int = 20) -> PassResult:
        graph = parse(text, opset=opset)
        rewritten = copy_graph(graph)
        result = step.run(rewritten, Context())
        assert [node.op for node in rewritten.nodes] == operators, [miss.reason for miss in result.near_misses]
        onnx.checker.check_model(to_model(rewritten), full_check=True)
        feeds = random_feeds(graph)
        found = Session(rewritten).run(feeds)
        for name, expected in Session(graph).run(feeds).items():
            # float32: a few dozen roundings of 2^-24 each, relative to the largest value
            bound = 1e-5 * max(float(np.max(np.abs(expected), initial=0)), 1.0)
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=bound)
        return result

    return fires


@pytest.fixture(scope="session")
def leaves_alone(parse: Any) -> Callable[..., None]:
    """Run a pass on ONNX text; nothing may change, and a near miss must give this reason."""

    def leaves_alone(step: Pass, text: str, reason: str, opset: int = 20) -> None:
        graph = parse(text, opset=opset)
        before = [node.op for node in graph.nodes]
        result = step.run(graph, Context())
        assert result.rewrites == []
        assert [node.op for node in graph.nodes] == before
        assert reason in [miss.reason for miss in result.near_misses]

    return leaves_alone
