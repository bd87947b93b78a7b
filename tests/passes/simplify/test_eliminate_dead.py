from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.graph import Graph, constants, copy_graph, from_model, scopes, to_model
from llmc.passes.simplify.eliminate_dead import EliminateDead

IF = (
    "(bool c, float[2] x) => (float[2] y) { a = Neg(x) b = Abs(x) d = Exp(x) "
    "y = If(c) <then_branch = t () => (float[2] z) { z = Relu(a) u = Relu(d) },"
    " else_branch = e () => (float[2] z2) { z2 = Identity(x) }> }"
)

TABLE = {
    "a chain that ends nowhere": ("(float[2] x) => (float[2] y) { y = Neg(x) a = Abs(x) b = Exp(a) }", ["a", "b"]),
    "captured by a subgraph only": (IF, ["b", "d", "u"]),
    "one output of two is used": (
        "(float[4] x) => (float[2] y) { y, b = Split<num_outputs = 2>(x) }",
        [],
    ),
    "nothing is dead": ("(float[2] x) => (float[2] y) { a = Abs(x) y = Neg(a) }", []),
    "an input that nothing reads": ("(float[2] x, float[2] w) => (float[2] y) { y = Neg(x) }", []),
    "the output is an input": ("(float[2] x) => (float[2] x) { a = Abs(x) }", ["a"]),
}


def made(graph: Graph) -> set[str]:
    return {t.name for scope in scopes(graph) for n in scope.nodes for t in n.outputs}


@pytest.mark.parametrize("name", TABLE)
def test_removes_exactly_what_is_dead(name: str, parse: Any) -> None:
    text, dead = TABLE[name]
    graph = parse(text)
    before = made(graph)
    result = EliminateDead().run(graph, Context())
    assert before - made(graph) == set(dead)
    assert len(result.rewrites) == len(dead)
    onnx.checker.check_model(to_model(graph), full_check=True)


@pytest.mark.parametrize("choice", [True, False])
def test_subgraphs_still_compute(choice: bool, parse: Any) -> None:
    graph = parse(IF)
    feeds = {"c": np.array(choice), "x": np.array([-1.0, 2.0], np.float32)}
    expected = Session(graph).run(feeds)
    EliminateDead().run(graph, Context())
    assert np.array_equal(Session(graph).run(feeds)["y"], expected["y"])


def test_constants_go_with_their_last_reader(parse: Any) -> None:
    graph = parse(
        "(float[2] x) => (float[2] y) <float[2] c = {1, 2}, float[2] d = {3, 4}> { y = Add(x, c) z = Add(x, d) }"
    )
    EliminateDead().run(graph, Context())
    assert [c.name for c in constants(graph)] == ["c"]
    assert all(node.op == "Add" for tensor in graph.inputs for node in tensor.outputs)
    assert len(graph.inputs[0].outputs) == 1


@pytest.mark.parametrize(
    ("body", "opset", "outputs"),
    [
        ("y, mask = Dropout(x)", 13, ["y"]),
        ("y, mean, deviation = LayerNormalization(x, s)", 17, ["y"]),
        ("y, mean, deviation = LayerNormalization(x, s) z = Neg(deviation)", 17, ["y", "mean", "deviation"]),
        ("y, mean, z = LayerNormalization(x, s)", 17, ["y", "mean", "z"]),
        ("t, y = TopK(x, k)", 13, ["t", "y"]),
        ("y, m, v = BatchNormalization<training_mode = 1>(x, s, s, s, s)", 15, ["y", "m", "v"]),
    ],
)
def test_drops_optional_outputs_at_the_end(body: str, opset: int, outputs: list[str], parse: Any) -> None:
    more = ", float[N,1] z" if "z =" in body else ""
    kind = "int64[N,1]" if "TopK" in body else "float[N,4]"
    graph = parse(
        f"(float[N,4] x) => ({kind} y{more}) <float[4] s = {{1, 2, 3, 4}}, int64[1] k = {{1}}> {{ {body} }}",
        opset=opset,
    )
    feeds = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}
    expected = Session(graph).run(feeds)
    result = EliminateDead().run(graph, Context())
    assert [t.name for t in graph.nodes[0].outputs] == outputs
    assert len(result.rewrites) == (outputs == ["y"])
    found = Session(graph).run(feeds)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stop_after", range(6))
def test_stops_after_any_rewrite_with_a_valid_graph(stop_after: int, parse: Any) -> None:
    graph = parse("(float[2] x) => (float[2] y) { a = Abs(x) b = Exp(a) c = Add(a, b) y, m = Dropout(x) }")
    whole = copy_graph(graph)
    EliminateDead().run(whole, Context())
    ledger = Ledger(stop_after)
    result = EliminateDead().run(graph, Context(ledger))
    assert [r.number for r in result.rewrites] == list(range(1, min(stop_after, 4) + 1))
    onnx.checker.check_model(to_model(graph), full_check=True)
    if stop_after >= 4:
        assert to_model(graph) == to_model(whole)


def test_time_is_linear_in_the_number_of_dead_nodes() -> None:
    """20,000 dead readers of one tensor: 0.2 s where each edge is touched once, minutes where each is searched for."""
    nodes = [onnx.helper.make_node("Abs", ["x"], [f"a{i}"]) for i in range(20_000)]
    nodes.append(onnx.helper.make_node("Neg", ["x"], ["y"]))
    info = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
    graph = from_model(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", info[:1], info[1:])))
    assert len(EliminateDead().run(graph, Context()).rewrites) == 20_000
    assert [node.op for node in graph.nodes] == ["Neg"]
