from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.graph import Graph, from_model, scopes, to_model
from llmc.passes.simplify.inline_control_flow import InlineControlFlow

HEAD = "(float[2] x) => (float[2] y)"
LOOP = "body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t{more})"

FIRES = {
    "the first branch": (
        f"{HEAD} <bool q = {{1}}> {{ y = If(q) <then_branch = t () => (float[2] z) {{ z = Neg(x) }},"
        "else_branch = e () => (float[2] w) { a = Exp(x) w = Abs(a) }> }",
        ["Neg"],
    ),
    "the second branch, and names that both have": (
        f"{HEAD} <bool q = {{0}}> {{ a = Neg(x) b = If(q) <then_branch = t () => (float[2] z)"
        "{ d = Relu(a) z = Neg(d) },"
        "else_branch = e () => (float[2] z) { d = Exp(a) z = Abs(d) }> y = Sub(b, a) }",
        ["Neg", "Exp", "Abs", "Sub"],
    ),
    "a condition behind Identity": (
        f"{HEAD} <bool q = {{1}}> {{ p = Identity(q) y = If(p) <then_branch = t () => (float[2] z) {{ z = Neg(x) }},"
        "else_branch = e () => (float[2] w) { w = Abs(x) }> }",
        ["Identity", "Neg"],
    ),
    "an If in an If": (
        f"{HEAD} <bool q = {{1}}, bool p = {{0}}> {{ y = If(q) <then_branch = t () => (float[2] z) {{ a = Neg(x)"
        " z = If(p) <then_branch = tt () => (float[2] u) { u = Relu(a) }, else_branch = te () => (float[2] v)"
        " { v = Sin(a) }> }, else_branch = e () => (float[2] w) { w = Abs(x) }> }",
        ["Neg", "Sin"],
    ),
    "an If inside the branch of another that stays": (
        "(bool q, float[2] x) => (float[2] y) <bool p = {0}> { y = If(q) <then_branch = t () => (float[2] z) {"
        " z = If(p) <then_branch = tt () => (float[2] u) { u = Relu(x) }, else_branch = te () => (float[2] v)"
        " { v = Sin(x) }> }, else_branch = e () => (float[2] w) { w = Abs(x) }> }",
        ["If", "Sin", "Abs"],
    ),
    "a branch that gives back constants and one tensor twice": (
        "(float[2] x) => (float[2] y, float[2] z, float[2] k) <bool q = {1}> { y, z, k = If(q) <"
        "then_branch = t () => (float[2] a, float[2] a2, float[2] c) <float[2] c = {1, 2}>"
        "{ a = Neg(x) a2 = Identity(a) },"
        "else_branch = e () => (float[2] u, float[2] v, float[2] w) { u = Abs(x) v = Exp(x) w = Sin(x) }> }",
        ["Neg", "Identity", "Identity"],
    ),
    "a Loop that runs never": (
        f'{HEAD} <int64 m = {{0}}> {{ a = Neg(x) y = Loop(m, "", a) <{LOOP.format(more="")}'
        "{ d = Identity(c) t = Abs(s) }> }",
        ["Neg"],
    ),
    "a Loop whose condition is false": (
        f"{HEAD} <bool q = {{0}}, int64 m = {{5}}> {{ a = Neg(x) b = Loop(m, q, a) <{LOOP.format(more='')}"
        "{ d = Identity(c) t = Abs(s) }> y = Exp(b) }",
        ["Neg", "Exp"],
    ),
    "a Loop that runs once": (
        "(float[2] x) => (float[2] y, float[1,2] z) <int64 m = {1}, bool q = {1}> {"
        f" a = Neg(x) y, z = Loop(m, q, a) <{LOOP.format(more=', float[2] u')}"
        "{ d = Identity(c) f = Cast<to=1>(i) g = Add(s, f) t = Mul(g, x) u = Abs(g) }> }",
        ["Neg", "Identity", "Cast", "Add", "Mul", "Abs", "Unsqueeze"],
    ),
    "a Loop without a condition": (
        f'{HEAD} <int64 m = {{1}}> {{ a = Neg(x) y = Loop(m, "", a) <{LOOP.format(more="")}'
        "{ d = Identity(c) t = Abs(s) }> }",
        ["Neg", "Identity", "Abs"],
    ),
    "a Loop that stops itself": (
        f"{HEAD} <int64 m = {{7}}, bool q = {{1}}, bool no = {{0}}> {{ a = Neg(x)"
        f" b = Loop(m, q, a) <{LOOP.format(more='')}"
        "{ d = Identity(no) t = Abs(s) }> y = Exp(b) }",
        ["Neg", "Identity", "Abs", "Exp"],
    ),
    "an If on the condition of a Loop that runs once": (
        f"{HEAD} <int64 m = {{1}}, bool q = {{1}}> {{ a = Neg(x) y = Loop(m, q, a) <{LOOP.format(more='')}"
        "{ d = Identity(c) t = If(c) <then_branch = tt () => (float[2] p) { p = Relu(s) },"
        " else_branch = te () => (float[2] r) { r = Sin(s) }> }> }",
        ["Neg", "Identity", "Relu"],
    ),
}

LEAVES_ALONE = {
    "a condition that is given": (
        "(bool q, float[2] x) => (float[2] y) { y = If(q) <then_branch = t () => (float[2] z) { z = Neg(x) },"
        "else_branch = e () => (float[2] w) { w = Abs(x) }> }",
        "",
    ),
    "a Loop that runs twice": (
        f'{HEAD} <int64 m = {{2}}> {{ y = Loop(m, "", x) <{LOOP.format(more="")} {{ d = Identity(c) t = Abs(s) }}> }}',
        "it may run 2 times",
    ),
    "a Loop that may run never": (
        "(bool q, float[2] x) => (float[2] y) <int64 m = {1}>"
        f"{{ y = Loop(m, q, x) <{LOOP.format(more='')} {{ d = Identity(c) t = Abs(s) }}> }}",
        "it may run 1 times",
    ),
    "a Loop of as many trips as are asked for": (
        "(int64 m, float[2] x) => (float[2] y)"
        f'{{ y = Loop(m, "", x) <{LOOP.format(more="")} {{ d = Identity(c) t = Abs(s) }}> }}',
        "",
    ),
    "a Scan": (
        "(float[2] x, float[N,2] u) => (float[2] y, float[N,2] z) { y, z = Scan <num_scan_inputs = 1, body = b "
        "(float[2] s, float[2] r) => (float[2] t, float[2] o) { t = Add(s, r) o = Neg(t) }> (x, u) }",
        "a Scan is not unrolled: it would be a copy of its body for each element, and hold for one length alone",
    ),
    "the results of no iteration": (
        "(float[2] x) => (float[2] y, float[N,2] z) <int64 m = {0}> {"
        f' y, z = Loop(m, "", x) <{LOOP.format(more=", float[2] u")} {{ d = Identity(c) t = Neg(s) u = Abs(s) }}> }}',
        "it runs never, and the shape of 'z' is not known",
    ),
}


def operators(graph: Graph) -> list[str]:
    return [node.op for scope in scopes(graph) for node in scope.nodes]


@pytest.mark.parametrize("name", FIRES)
@pytest.mark.parametrize("opset", [12, 20])
def test_fires(name: str, opset: int, parse: Any, random_feeds: Any) -> None:
    text, left = FIRES[name]
    graph = parse(text, opset=opset)
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)
    result = InlineControlFlow().run(graph, Context())
    assert operators(graph) == left
    assert result.near_misses == []
    onnx.checker.check_model(to_model(graph), full_check=True)
    found = Session(graph).run(feeds)
    assert list(found) == list(expected)
    assert all(np.array_equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = parse(text)
    before = to_model(graph)
    result = InlineControlFlow().run(graph, Context())
    assert result.rewrites == []
    assert to_model(graph) == before
    assert [miss.reason for miss in result.near_misses] == ([reason] if reason else [])


@pytest.mark.parametrize("stop_after", range(3))
def test_stops_after_any_rewrite_with_the_same_results(stop_after: int, parse: Any, random_feeds: Any) -> None:
    graph = parse(FIRES["an If in an If"][0])
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)["y"]
    result = InlineControlFlow().run(graph, Context(Ledger(stop_after)))
    assert [a.number for a in result.rewrites] == list(range(1, stop_after + 1))
    assert np.array_equal(Session(graph).run(feeds)["y"], expected)


def test_nothing_reads_for_the_branch_that_is_gone(parse: Any) -> None:
    graph = parse(FIRES["the first branch"][0])
    InlineControlFlow().run(graph, Context())
    assert [node.op for node in graph.inputs[0].outputs] == ["Neg"]


@st.composite
def nested(draw: Any, depth: int = 0, outer: tuple[str, ...] = ("x",)) -> tuple[list[onnx.NodeProto], list[str]]:
    """Nodes over names that sibling scopes share, with If and Loop in them; the names that they make."""
    nodes: list[onnx.NodeProto] = []
    names = list(outer)
    made: list[str] = []
    for index in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["Neg", "Add", "If", "Loop"] if depth < 2 else ["Neg", "Add"]))
        name = f"t{depth}_{index}"
        one = st.sampled_from(names)
        if kind == "Neg":
            nodes.append(onnx.helper.make_node("Neg", [draw(one)], [name]))
        elif kind == "Add":
            nodes.append(onnx.helper.make_node("Add", [draw(one), draw(one)], [name]))
        elif kind == "If":
            branches = {key: draw(graph_of(depth + 1, tuple(names))) for key in ("then_branch", "else_branch")}
            nodes.append(
                onnx.helper.make_node("If", [draw(st.sampled_from(["true", "false", "q"]))], [name], **branches)
            )
        else:
            trips, condition = (
                draw(st.sampled_from(["", "zero", "one", "two"])),
                draw(st.sampled_from(["true", "q", ""])),
            )
            trips = trips if condition else trips or "one"
            body = draw(graph_of(depth + 1, (*names, f"s{depth}")))
            ends = not trips or draw(st.booleans())
            on = onnx.helper.make_node(
                "Identity", ["false"] if ends else [draw(st.sampled_from(["q", "true"]))], [f"on{depth}"]
            )
            body.node.insert(0, on)
            body.output.insert(0, onnx.helper.make_tensor_value_info(f"on{depth}", 9, []))
            for start, dtype, shape in (("i", 7, []), ("go", 9, []), ("s", 1, [2])):
                body.input.append(onnx.helper.make_tensor_value_info(f"{start}{depth}", dtype, shape))
            nodes.append(onnx.helper.make_node("Loop", [trips, condition, draw(one)], [name], body=body))
        names.append(name)
        made.append(name)
    return nodes, made


@st.composite
def graph_of(draw: Any, depth: int, outer: tuple[str, ...]) -> onnx.GraphProto:
    nodes, made = draw(nested(depth, outer))
    return onnx.helper.make_graph(nodes, f"g{depth}", [], [onnx.helper.make_tensor_value_info(made[-1], 1, [2])])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(nested(), st.booleans())
def test_nests_compute_the_same(case: tuple[list[onnx.NodeProto], list[str]], q: bool) -> None:
    nodes, made = case
    scalar = {"true": True, "false": False, "zero": 0, "one": 1, "two": 2}
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, [2]), onnx.helper.make_tensor_value_info("q", 9, [])],
            [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in made],
            [onnx.numpy_helper.from_array(np.array(value), name) for name, value in scalar.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    graph = from_model(model)
    feeds = {"x": np.array([1.5, -2.0], np.float32), "q": np.array(q)}
    expected = Session(graph).run(feeds)
    result = InlineControlFlow().run(graph, Context())
    conditions = [node.inputs[0].name for scope in scopes(graph) for node in scope.nodes if node.op == "If"]
    assert {"true", "false"}.isdisjoint(conditions), result.near_misses
    onnx.checker.check_model(to_model(graph), full_check=True)
    found = Session(graph).run(feeds)
    assert all(np.array_equal(found[key], value) for key, value in expected.items())


def test_branches_side_by_side_share_their_names() -> None:
    """A thousand of them: 0.3 s where each edge is touched once."""
    branch = {
        key: onnx.helper.make_graph(
            [onnx.helper.make_node(op, ["x"], ["z"])], "b", [], [onnx.helper.make_tensor_value_info("z", 1, [2])]
        )
        for key, op in (("then_branch", "Neg"), ("else_branch", "Abs"))
    }
    nodes = [onnx.helper.make_node("If", ["q"], [f"y{i}"], **branch) for i in range(1_000)]
    nodes.append(onnx.helper.make_node("Sum", [f"y{i}" for i in range(1_000)], ["y"]))
    info = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
    true = onnx.numpy_helper.from_array(np.array(True), "q")
    graph = from_model(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", info[:1], info[1:], [true])))
    assert len(InlineControlFlow().run(graph, Context()).rewrites) == 1_000
    assert {node.op for node in graph.nodes} == {"Neg", "Sum"}
    assert len({t.name for node in graph.nodes for t in node.outputs}) == 1_001
