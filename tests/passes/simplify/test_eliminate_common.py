from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.graph import Graph, constants, from_model, load_model, save_model, scopes, to_model
from llmc.passes.simplify.eliminate_common import EliminateCommon

X = "(float[N,4] x) => (float[N,4] y)"
WEIGHTS = "<float[4] v = {1, 2, 3, 4}, float[4] w = {1, 2, 3, 4}, float c = {2}, int64[1] axes = {0}>"

MERGES = {
    "two equal nodes": (f"{X} {{ a = Abs(x) b = Abs(x) y = Add(a, b) }}", 1),
    "equal to the third level": (
        f"{X} {{ a = Abs(x) b = Abs(x) d = Neg(a) e = Neg(b) f = Exp(d) g = Exp(e) y = Add(f, g) }}",
        3,
    ),
    "equal constants": (f"{X} {WEIGHTS} {{ a = Add(x, v) b = Add(x, w) y = Mul(a, b) }}", 2),
    "missing inputs at the end": (f'{X} {WEIGHTS} {{ a = Clip(x, c) b = Clip(x, c, "") y = Add(a, b) }}', 1),
    "equal attributes": (f"{X} {{ a = Softmax<axis=1>(x) b = Softmax<axis=1>(x) y = Add(a, b) }}", 1),
    "the second is an output": (f"{X} {{ a = Neg(x) y = Neg(x) b = Exp(a) }}", 1),
    "both are outputs": ("(float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Neg(x) z = Neg(x) }", 1),
    "both are outputs, with readers": (
        "(float[N,4] x) => (float[N,4] y, float[N,4] z, float[N,4] w) { y = Neg(x) z = Neg(x) w = Add(y, z) }",
        1,
    ),
    "several results, one of them an output": (
        "(float[N,4] x) => (float[N,2] y, float[N,2] z) "
        "{ a, b = Split<axis=1, num_outputs=2>(x) d, y = Split<axis=1, num_outputs=2>(x) z = Add(a, d) }",
        1,
    ),
    "inside a subgraph": (
        "(bool q, float[N,4] x) => (float[N,4] y) { y = If(q) <"
        "then_branch = t () => (float[N,4] z) { a = Abs(x) b = Abs(x) z = Add(a, b) },"
        "else_branch = e () => (float[N,4] z2) { z2 = Neg(x) }> }",
        1,
    ),
    "equal tensors in attributes": (
        "(int64[2] s) => (float[N,M] y) "
        "{ a = ConstantOfShape<value = float[1] {1}>(s) b = ConstantOfShape<value = float[1] {1}>(s) y = Add(a, b) }",
        1,
    ),
}

LEAVES_ALONE = {
    "another input is missing": (f'{X} {WEIGHTS} {{ a = Clip(x, "", c) b = Clip(x, c, "") y = Add(a, b) }}', ""),
    "inputs in another order": (f"{X} {WEIGHTS} {{ a = Sub(x, c) b = Sub(c, x) y = Add(a, b) }}", ""),
    "other attributes": (f"{X} {{ a = Softmax<axis=0>(x) b = Softmax<axis=1>(x) y = Add(a, b) }}", ""),
    "0.0 is not -0.0": (f"{X} {{ a = Elu<alpha=0.0>(x) b = Elu<alpha=-0.0>(x) y = Add(a, b) }}", ""),
    "constants of another shape": (
        f"{X} <float[1] v = {{1}}, float[1,1] w = {{1}}> {{ a = Add(x, v) b = Mul(x, w) y = Add(a, b) }}",
        "",
    ),
    "constants of another type": (
        "(float[N,4] x, int32 i) => (float[N,4] y) <float v = {0}, int32 w = {0}> "
        "{ a = Add(x, v) b = Add(i, w) d = Cast<to=1>(b) y = Add(a, d) }",
        "",
    ),
    "0.0 is not -0.0, as constants": (
        f"{X} <float v = {{0.0}}, float w = {{-0.0}}> {{ a = Div(x, v) b = Mul(x, w) y = Add(a, b) }}",
        "",
    ),
    "random": (f"{X} {{ a = RandomNormalLike(x) b = RandomNormalLike(x) y = Add(a, b) }}", "another result each time"),
    "random with a seed": (
        f"{X} {{ a = RandomUniformLike<seed=1.0>(x) b = RandomUniformLike<seed=1.0>(x) y = Add(a, b) }}",
        "another result each time",
    ),
    "Dropout in training": (
        f"{X} <float r = {{0.5}}, bool t = {{1}}> {{ a = Dropout(x, r, t) b = Dropout(x, r, t) y = Add(a, b) }}",
        "another result each time",
    ),
    "with subgraphs": (
        "(bool q, float[N,4] x) => (float[N,4] y) {"
        "a = If(q) <then_branch = t () => (float[N,4] z) { z = Abs(x) },"
        "else_branch = e () => (float[N,4] z) { z = Neg(x) }>"
        "b = If(q) <then_branch = t () => (float[N,4] z) { z = Abs(x) },"
        "else_branch = e () => (float[N,4] z) { z = Neg(x) }>"
        "y = Add(a, b) }",
        "",
    ),
    "two outputs that are the input already": (
        "(float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Identity(x) z = Identity(x) }",
        "both make outputs of the graph",
    ),
}


def names(graph: Graph) -> list[str]:
    return [tensor.name for tensor in graph.outputs]


@pytest.mark.parametrize("name", MERGES)
def test_merges(name: str, parse: Any, random_feeds: Any) -> None:
    text, count = MERGES[name]
    graph = parse(text)
    feeds = {"s": np.array([2, 3])} if "int64[2] s" in text else random_feeds(graph)
    outputs, expected, size = names(graph), Session(graph).run(feeds), sum(1 for _ in nodes(graph))
    result = EliminateCommon().run(graph, Context())
    assert len(result.rewrites) == count
    assert names(graph) == outputs
    merged = sum(r.rule == "equal-node" for r in result.rewrites)
    assert size - sum(1 for _ in nodes(graph)) == merged - (name.startswith("both"))
    onnx.checker.check_model(to_model(graph), full_check=True)
    found = Session(graph).run(feeds)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def nodes(graph: Graph) -> Any:
    return (node for scope in scopes(graph) for node in scope.nodes)


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = parse(text)
    before = to_model(graph)
    result = EliminateCommon().run(graph, Context())
    assert result.rewrites == []
    assert to_model(graph) == before
    assert [reason in miss.reason for miss in result.near_misses] == [True] * bool(reason)


def test_leaves_other_domains_alone() -> None:
    made = [onnx.helper.make_node("Sample", ["x"], [name], domain="my.domain") for name in "ab"]
    info = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
    graph = from_model(
        onnx.helper.make_model(
            onnx.helper.make_graph([*made, onnx.helper.make_node("Add", ["a", "b"], ["y"])], "g", info[:1], info[1:]),
            opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("my.domain", 1)],
        )
    )
    result = EliminateCommon().run(graph, Context())
    assert result.rewrites == []
    assert result.near_misses[0].reason == "operators of domain 'my.domain' may not give the same result twice"


def test_equal_outputs_become_one_and_its_identity(parse: Any) -> None:
    graph = parse(MERGES["both are outputs, with readers"][0])
    EliminateCommon().run(graph, Context())
    assert [(n.op, [t.name for t in n.inputs]) for n in graph.nodes] == [
        ("Neg", ["x"]),
        ("Identity", ["y"]),
        ("Add", ["y", "y"]),
    ]


def test_large_constants_are_compared_to_their_end_and_merged_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((64, 64)).astype(np.float32)
    other = first.copy()
    other[-1, -1] += 1
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[N,64] x) => (float[N,64] y)'
        "{ p = MatMul(x, a) q = MatMul(x, b) r = MatMul(x, c) y = Sum(p, q, r) }"
    )
    weights = {"a": first, "b": first.copy(), "c": other}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in weights.items())
    save_model(from_model(model), tmp_path / "model.onnx", inline_below=1024)
    graph = load_model(tmp_path / "model.onnx")
    feeds = {"x": rng.standard_normal((3, 64)).astype(np.float32)}
    expected = Session(graph).run(feeds)["y"]
    result = EliminateCommon().run(graph, Context())
    assert sorted(r.rule for r in result.rewrites) == ["equal-constant", "equal-node"]
    assert len(list(constants(graph))) == 2
    assert np.array_equal(Session(graph).run(feeds)["y"], expected)


@pytest.mark.parametrize("stop_after", range(8))
def test_stops_after_any_rewrite_with_the_same_results(stop_after: int, parse: Any, random_feeds: Any) -> None:
    graph = parse(
        f"(float[N,4] x) => (float[N,4] y, float[N,4] z) {WEIGHTS}"
        "{ a = Add(x, v) b = Add(x, w) d = Neg(a) e = Neg(b) z = Neg(b) y = Add(d, e) }"
    )
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)
    result = EliminateCommon().run(graph, Context(Ledger(stop_after)))
    assert len(result.rewrites) == min(stop_after, 4)
    found = Session(graph).run(feeds)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_time_is_linear_in_the_number_of_equal_nodes() -> None:
    """10,000 equal readers of one tensor: tenths of a second where each edge is touched once."""
    count = 10_000
    made = [onnx.helper.make_node("Shape", ["x"], [f"s{i}"]) for i in range(count)]
    made += [onnx.helper.make_node("Neg", [f"s{i}"], [f"n{i}"]) for i in range(count)]
    made.append(onnx.helper.make_node("Identity", [f"n{count - 1}"], ["y"]))
    x, y = onnx.helper.make_tensor_value_info("x", 1, ["N"]), onnx.helper.make_tensor_value_info("y", 7, [1])
    graph = from_model(onnx.helper.make_model(onnx.helper.make_graph(made, "g", [x], [y])))
    assert len(EliminateCommon().run(graph, Context()).rewrites) == 2 * (count - 1)
    assert [(node.op, node.inputs[0].name) for node in graph.nodes] == [
        ("Shape", "x"),
        ("Neg", "s0"),
        ("Identity", "n0"),
    ]
