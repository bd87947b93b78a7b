from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.fuse.fuse_constant_chains import FuseConstantChains
from llmc.passes.graph import constants, load_values

HEAD = "(float[N,4] x) => (float[N,4] y) <float[4] a = {1, 2, 3, 4}, float b = {0.5}, float[1] c = {4}>"

FIRES = {
    "sums": ("s = Add(x, a) t = Add(b, s) y = Sub(t, c)", ["Add"], [-2.5, -1.5, -0.5, 0.5]),
    "differences": ("s = Sub(x, a) t = Sub(s, b) y = Add(t, c)", ["Add"], [2.5, 1.5, 0.5, -0.5]),
    "products": ("s = Mul(x, a) t = Mul(b, s) y = Div(t, c)", ["Mul"], [0.125, 0.25, 0.375, 0.5]),
    "quotients": ("s = Div(x, b) y = Div(s, c)", ["Div"], [2]),
    "a quotient, multiplied": ("s = Div(x, b) y = Mul(s, c)", ["Mul"], [8]),
}

LEAVES_ALONE = {
    "the first result is read elsewhere": (
        "(float[N] x) => (float[N] y, float[N] s) <float a = {1}, float b = {2}> { s = Add(x, a) y = Add(s, b) }",
        "'s', inside the pattern, is an output of the graph",
    ),
    "larger together": (
        "(float[2,3] x) => (float[2,3] y) <float[2,1] a = {1, 2}, float[3] b = {1, 2, 3}>"
        "{ s = Mul(x, a) y = Mul(s, b) }",
        "'a' and 'b' together are larger than each",
    ),
    "an overflow": (
        "(float[N] x) => (float[N] y) <float a = {1e30}, float b = {1e30}> { s = Mul(x, a) y = Mul(s, b) }",
        "both constants together overflow float32",
    ),
    "an underflow": (
        "(float[N] x) => (float[N] y) <float a = {1e-30}, float b = {1e-30}> { s = Mul(x, a) y = Mul(s, b) }",
        "both constants together are too small for float32",
    ),
    "division by zero": (
        "(float[N] x) => (float[N] y) <float a = {1}, float b = {0}> { s = Mul(x, a) y = Div(s, b) }",
        "both constants together overflow float32",
    ),
    "integers divided": (
        "(int64[N] x) => (int64[N] y) <int64 a = {3}, int64 b = {2}> { s = Div(x, a) y = Div(s, b) }",
        "integers are rounded by each division",
    ),
    "one is no constant": (
        "(float[N] x, float[N] a) => (float[N] y) <float b = {2}> { s = Div(x, a) y = Mul(s, b) }",
        "'a' is not a constant",
    ),
    "a product that is larger": (
        "(float[N,3] x) => (float[N,3] y) <float[3,1] a = {1, 2, 3}, float[1,3] b = {1, 2, 3}>"
        "{ s = MatMul(x, a) y = MatMul(s, b) }",
        "the product of 'a' and 'b' is larger than what would go",
    ),
    "matrices in a stack": (
        "(float[N,1] x) => (float[A,B,C] y) <float[1,1] a = {1}, float[1,1,1] b = {2}>"
        "{ s = MatMul(x, a) y = MatMul(s, b) }",
        "'a' and 'b' are not both matrices",
    ),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any, random_feeds: Any) -> None:
    body, left, expected = FIRES[name]
    graph = parse(f"{HEAD} {{ {body} }}")
    feeds = random_feeds(graph)
    before = Session(graph).run(feeds)["y"]
    FuseConstantChains().run(graph, Context())
    assert [node.op for node in graph.nodes] == left
    (constant,) = constants(graph)
    assert load_values(constant).reshape(-1).tolist() == expected
    # Three roundings of 2^-24 each, of values up to 20.
    np.testing.assert_allclose(Session(graph).run(feeds)["y"], before, rtol=0, atol=60 * 2.0**-24)


def test_integers_wrap_as_they_did(parse: Any) -> None:
    graph = parse(
        "(int64[N] x) => (int64[N] y) <int64 a = {9223372036854775807}, int64 b = {3}> { s = Add(x, a) y = Add(s, b) }"
    )
    feeds = {"x": np.array([-5, 0, 7])}
    expected = Session(graph).run(feeds)["y"]
    FuseConstantChains().run(graph, Context())
    assert [node.op for node in graph.nodes] == ["Add"]
    assert np.array_equal(Session(graph).run(feeds)["y"], expected)


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = parse(text)
    before = [node.op for node in graph.nodes]
    result = FuseConstantChains().run(graph, Context())
    assert result.rewrites == []
    assert [node.op for node in graph.nodes] == before
    assert reason in {miss.reason for miss in result.near_misses} | {
        m.reason[: len(reason)] for m in result.near_misses
    }
