"""What rounding does to nodes, measured, and what has to stay as it is for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.session import Session
from llmc.passes.graph import copy_graph, infer_shapes
from llmc.passes.precision.convert_bf16 import ConvertBf16
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.precision.half import BFLOAT16, FLOAT16, Half
from llmc.passes.precision.half_twins import Trial, losses

IN = "(float[N,64] x) => (float[N,64] y)"


def feeds(seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((8, 64)).astype(np.float32)}


def loss(graph: Any, trial: Trial, half: Half = FLOAT16, **options: Any) -> float:
    infer_shapes(graph)
    (found,) = losses(copy_graph(graph), [trial], half, SampledActivations([feeds()]), 1, **options)
    return found


@pytest.mark.parametrize("half", [FLOAT16, BFLOAT16])
def test_a_loss_is_what_numpy_says(half: Half, parse: Any) -> None:
    graph = parse(f"{IN} <float c = {{0.1}}> {{ a = Mul(x, c) y = Exp(a) }}")
    x = feeds()["x"]
    factor = np.float32(0.1).astype(half.numpy).astype(np.float32)
    found = (x.astype(half.numpy).astype(np.float32) * factor).astype(half.numpy).astype(np.float32)
    exact = x * np.float32(0.1)
    expected = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert loss(graph, Trial("a"), half) == pytest.approx(expected, rel=1e-5)  # sums of 512 squares in float32


def test_float32_nodes_find_constants_and_inputs_as_they_were(parse: Any) -> None:
    graph = parse(f"{IN} <float c = {{0.1}}> {{ y = Mul(x, c) }}")
    assert loss(graph, Trial("y", frozenset({"y"}))) == 0
    assert 0 < loss(graph, Trial("y", frozenset({"y"})), border=True) < loss(graph, Trial("y"))


def test_an_infinity_that_float32_has_not(parse: Any) -> None:
    assert loss(parse(f"{IN} <float c = {{1e6}}> {{ y = Mul(x, c) }}"), Trial("y")) == np.inf
    assert loss(parse(f"{IN} <float c = {{1e6}}> {{ y = Mul(x, c) }}"), Trial("y"), BFLOAT16) < 0.01


# 2^-11 of 1000 is 0.5: nothing is left of differences of 1
CANCELS = f"{IN} <float c = {{1000}}> {{ t = Tanh(x) a = Add(t, c) y = Sub(a, c) }}"
KEEPS: dict[str, tuple[str, set[str]]] = {
    "a difference of large numbers": (CANCELS, {"Add", "Sub"}),
    "moved on the way": (
        f"{IN} <float c = {{1000}}> {{ t = Tanh(x) a = Add(t, c) b = Transpose(a) d = Transpose(b) y = Sub(d, c) }}",
        {"Add", "Sub", "Transpose"},
    ),
    "a logarithm of nearly 1": (
        f"{IN} <float s = {{0.001}}, float c = {{1}}> {{ t = Tanh(x) m = Mul(t, s) a = Add(m, c) y = Log(a) }}",
        {"Add", "Log"},
    ),
}


@pytest.mark.parametrize("name", KEEPS)
@pytest.mark.parametrize("kind", [ConvertFp16, ConvertBf16])
def test_keeps_what_rounding_would_spoil(name: str, kind: Any, parse: Any, convert: Any) -> None:
    text, operators = KEEPS[name]
    graph = parse(text)
    truth = Session(graph).run(feeds())["y"]
    result = convert(graph, feeds(), kind=kind)
    assert {node.op for node in graph.nodes if node.name in result.kept} | {"Transpose"} == operators | {"Transpose"}
    assert all("off on the data with" in reason for reason in result.kept.values())
    assert result.warnings == []
    # Only Tanh, Exp or Mul is rounded, and what comes of it: at most a few roundings of it
    bound = 4 / kind.half.whole * float(np.abs(truth).max())
    np.testing.assert_allclose(Session(graph).run(feeds())["y"], truth, rtol=0, atol=bound)


def test_without_it_nothing_would_be_left(parse: Any, convert: Any) -> None:
    graph = parse(CANCELS)
    truth = Session(graph).run(feeds())["y"]
    convert(graph, feeds(), loss=1e6)
    assert np.abs(Session(graph).run(feeds())["y"] - truth).max() > 0.2 * np.abs(truth).max()


HEALTHY: dict[str, str] = {
    "a softmax": f"{IN} {{ a = Tanh(x) y = Softmax(a) }}",
    "a normalization": f"{IN} <float c = {{3}}> {{ a = Mul(x, c) s = ReduceMean <keepdims=1> (a) y = Sub(a, s) }}",
    "small numbers": f"{IN} <float c = {{0.01}}> {{ a = Mul(x, c) y = Sigmoid(a) }}",
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("kind", [ConvertFp16, ConvertBf16])
def test_leaves_what_is_well_in_16_bits(name: str, kind: Any, parse: Any, convert: Any) -> None:
    graph = parse(HEALTHY[name])
    result = convert(graph, feeds(), kind=kind)
    assert result.kept == {}
    assert result.warnings == []


def test_what_cannot_be_helped_is_said(parse: Any, convert: Any) -> None:
    """A difference of large numbers after so long a way that more than what is tried would have to stay float32."""
    way = "a = Add(t, c) p = Mul(a, c) q = Sqrt(p) r = Mul(q, q) s = Div(r, c) u = Neg(s)"
    graph = parse(f"{IN} <float c = {{100}}> {{ t = Tanh(x) {way} y = Add(u, c) }}")
    result = convert(graph, feeds())
    assert result.kept == {}
    (warning,) = result.warnings
    assert warning.startswith("'y' is ")
    assert warning.endswith("off on the data in float16, and with 4 nodes before it as they are too")
