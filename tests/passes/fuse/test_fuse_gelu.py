from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.fuse.fuse_gelu import FuseGelu
from llmc.passes.graph import copy_graph

HEAD = "(float[N,4] x) => (float[N,4] y{more}) <float s = {{{s}}}, float one = {{{one}}}, float h = {{0.5}}>"


def model(body: str, s: float = 1.41421356, one: float = 1.0, more: str = "") -> str:
    return HEAD.format(s=s, one=one, more=more) + "{" + body + "}"


FIRES = {
    "torch": "d = Div(x, s) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, h)",
    "half first": "d = Div(x, s) e = Erf(d) a = Add(e, one) m = Mul(x, h) y = Mul(m, a)",
    "half inside": "d = Div(x, s) e = Erf(d) a = Add(one, e) m = Mul(h, a) y = Mul(m, x)",
    "constant behind Identity": (
        "i = Identity(s) d = Div(x, i) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, h)"
    ),
}

TANH = (
    "(float[N,4] x) => (float[N,4] y{more}) <float k = {{{k}}}, float three = {{3}}, float r = {{0.79788456}}, "
    "float one = {{1}}, float h = {{0.5}}>{{"
)
TORCH = "c = Pow(x, three) p = Mul(c, k) i = Add(x, p) s = Mul(i, r) t = Tanh(s) a = Add(t, one) "


def tanh(body: str, k: float = 0.044715, more: str = "") -> str:
    return TANH.format(k=k, more=more) + body + "}"


FIRES_TANH = {
    "torch": tanh(TORCH + "m = Mul(x, h) y = Mul(m, a)"),
    "half last": tanh(TORCH + "m = Mul(x, a) y = Mul(m, h)"),
    "cube of products": tanh(
        TORCH.replace("Pow(x, three)", "Mul(q, x)").replace("c =", "q = Mul(x, x) c =") + "m = Mul(x, h) y = Mul(m, a)"
    ),
    "BLOOM": tanh(
        "u = Mul(x, k) v = Mul(u, x) w = Add(v, one) z = Mul(x, r) s = Mul(z, w) t = Tanh(s) a = Add(t, one) "
        "m = Mul(x, h) y = Mul(m, a)"
    ),
    "Sum instead of Add": tanh(TORCH.replace("Add", "Sum") + "m = Mul(x, h) y = Mul(m, a)"),
}

LEAVES_ALONE_TANH = {
    "wrong cubic factor": (
        tanh(TORCH + "m = Mul(x, h) y = Mul(m, a)", k=0.05),
        "'k' is 0.05, GeluFromTanh needs 0.044715",
    ),
    "tanh is an output": (
        tanh(TORCH + "m = Mul(x, h) y = Mul(m, a)", more=", float[N,4] t"),
        "'t', inside the pattern, is an output of the graph",
    ),
    "quick GELU": (
        "(float[N,4] x) => (float[N,4] y) <float k = {1.702}> { p = Mul(x, k) t = Tanh(p) y = Mul(x, t) }",
        "the result of Tanh 't' goes to Mul 'y', where Add is needed",
    ),
}

LEAVES_ALONE = {
    "wrong constant": (model(FIRES["torch"], s=1.5), "'s' is 1.5, GeluFromErf needs 1.41421"),
    "wrong offset": (model(FIRES["torch"], one=1.1), "'one' is 1.1, GeluFromErf needs 1"),
    "inner tensor is an output": (
        model(FIRES["torch"], more=", float[N,4] a"),
        "'a', inside the pattern, is an output of the graph",
    ),
    "inner tensor has a second user": (
        model(FIRES["torch"] + " z = Relu(e)", more=", float[N,4] z"),
        "'e', inside the pattern, is also used by Relu 'z'",
    ),
    "two different inputs": (
        "(float[N,4] x, float[N,4] w) => (float[N,4] y) <float s = {1.41421}, float one = {1.0}, float h = {0.5}>"
        "{ d = Div(w, s) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, h) }",
        "'w' stands where 'x' must stand again (x)",
    ),
    "divisor is a tensor": (
        "(float[N,4] x, float s) => (float[N,4] y) <float one = {1.0}, float h = {0.5}>"
        "{ d = Div(x, s) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, h) }",
        "'s' is not a constant, where 1.41421 is needed",
    ),
    "Erf alone": (
        model("d = Div(x, s) e = Erf(d) y = Softmax(e)"),
        "the result of Erf 'e' goes to Softmax 'y', where Add is needed",
    ),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any, random_feeds: Any) -> None:
    graph = parse(model(FIRES[name]))
    fused = copy_graph(graph)
    result = FuseGelu().run(fused, Context())
    assert [n.op for n in fused.nodes if n.op != "Identity"] == ["Gelu"]
    assert [(r.number, r.rule) for r in result.rewrites] == [(1, "GeluFromErf")]
    assert result.near_misses == []
    feeds = random_feeds(graph)
    # float32: the long form rounds six times, 2^-24 each, on values of order 1
    np.testing.assert_allclose(Session(fused).run(feeds)["y"], Session(graph).run(feeds)["y"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = parse(text)
    before = [n.op for n in graph.nodes]
    result = FuseGelu().run(graph, Context())
    assert result.rewrites == []
    assert [n.op for n in graph.nodes] == before
    assert [miss.reason for miss in result.near_misses] == [reason]


@pytest.mark.parametrize("name", FIRES_TANH)
def test_tanh_fires(name: str, fires: Any, parse: Any) -> None:
    fires(FuseGelu(), FIRES_TANH[name], ["Gelu"])
    graph = parse(FIRES_TANH[name])
    FuseGelu().run(graph, Context())
    assert graph.nodes[0].attrs["approximate"] == "tanh"


@pytest.mark.parametrize("name", LEAVES_ALONE_TANH)
def test_tanh_leaves_alone(name: str, leaves_alone: Any) -> None:
    leaves_alone(FuseGelu(), *LEAVES_ALONE_TANH[name])


def test_fires_inside_a_subgraph(parse: Any) -> None:
    graph = parse(
        "(bool c, float[2,4] x) => (float[2,4] y) <float s = {1.41421}, float one = {1.0}, float h = {0.5}> {"
        "y = If (c) <then_branch = t () => (float[2,4] ty) {"
        " d = Div(x, s) e = Erf(d) a = Add(e, one) m = Mul(x, a) ty = Mul(m, h) },"
        " else_branch = f () => (float[2,4] ty) { ty = Identity(x) }> }"
    )
    result = FuseGelu().run(graph, Context())
    assert [n.op for n in graph.nodes[0].attrs["then_branch"].nodes] == ["Gelu"]
    assert len(result.rewrites) == 1


def test_stops_after_the_last_allowed_rewrite(parse: Any) -> None:
    text = "d = Div(x, s) e = Erf(d) a = Add(e, one) m = Mul(x, a) {}= Mul(m, h)"
    second = "D = Div(v, s) E = Erf(D) A = Add(E, one) M = Mul(v, A) y = Mul(M, h)"
    graph = parse(model(text.format("v ") + second))
    result = FuseGelu().run(graph, Context(ledger=Ledger(stop_after=1)))
    assert len(result.rewrites) == 1
    assert sorted(n.op for n in graph.nodes) == ["Add", "Div", "Erf", "Gelu", "Mul", "Mul"]


def test_raises_an_old_opset(parse: Any) -> None:
    graph = parse(model(FIRES["torch"]), opset=13)
    FuseGelu().run(graph, Context())
    assert graph.opset == 20
    assert [n.op for n in graph.nodes] == ["Gelu"]
