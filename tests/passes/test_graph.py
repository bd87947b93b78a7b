from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from llmc.compiler.session import Session
from llmc.passes.graph import (
    Constant,
    Derived,
    Graph,
    Node,
    Tensor,
    constants,
    copy_graph,
    fresh_names,
    from_model,
    load_model,
    load_values,
    remove_nodes,
    replace_uses,
    rewire,
    save_model,
    scopes,
    to_model,
)

BRANCHES = (
    "(bool q, float[2] x) => (float[2] y) { a = Abs(x) y = If(q) <"
    "then_branch = t () => (float[2] z) { THEN }, else_branch = e () => (float[2] z) { ELSE }> }"
)


def edges(graph: Graph) -> dict[str, list[str]]:
    """Tensor → outputs of the nodes that read it, checked against what those nodes say they read."""
    found: dict[str, list[str]] = {}
    for scope in scopes(graph):
        for node in scope.nodes:
            for tensor in node.inputs:
                assert sum(user is node for user in tensor.outputs) == sum(t is tensor for t in node.inputs)
                found[tensor.name] = sorted(user.outputs[0].name for user in tensor.outputs)
    return found


@pytest.mark.parametrize("choice", [True, False])
@pytest.mark.parametrize(
    ("then", "other"),
    [
        ("c = Constant<value = float[2] {1, 2}>() z = Add(x, c)", "c = Neg(x) z = Add(x, c)"),
        ("c = Neg(x) z = Add(x, c)", "c = Constant<value = float[2] {1, 2}>() z = Add(x, c)"),
        (
            "c = Constant<value = float[2] {1, 2}>() z = Add(x, c)",
            "c = Constant<value = float[2] {3, 4}>() z = Add(x, c)",
        ),
        ("z = Constant<value = float[2] {1, 2}>()", "z = Neg(x)"),
    ],
    ids=["constant and variable", "variable and constant", "two constants", "a result that is constant"],
)
def test_sibling_subgraphs_may_use_one_name_twice(then: str, other: str, choice: bool) -> None:
    text = BRANCHES.replace("THEN", then).replace("ELSE", other)
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {text}')
    graph = from_model(model)
    onnx.checker.check_model(to_model(graph), full_check=True)
    x = np.array([5.0, -7.0], np.float32)
    expected = onnx.reference.ReferenceEvaluator(model).run(None, {"q": np.array(choice), "x": x})[0]
    for one in (graph, copy_graph(graph)):
        assert np.array_equal(Session(one).run({"q": np.array(choice), "x": x})["y"], expected)


def test_initializers_that_are_inputs_too_keep_their_names() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["": 8]> g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}>'
        "{ y = Add(x, w) }"
    )
    graph = from_model(model)
    assert [c.name for c in constants(graph)] == ["w"]
    assert [t.name for t in graph.inputs] == ["x"]


def test_edges_stay_consistent(parse: Any) -> None:
    graph = parse(
        "(float[2] x) => (float[2] y) { a = Abs(x) b = Neg(x) c = Add(a, a) d = Add(a, b) e = Add(c, d) y = Exp(e) }"
    )
    tensors: dict[str, Tensor] = graph.tensors()
    nodes = {node.outputs[0].name: node for node in graph.nodes}
    replace_uses(tensors["a"], tensors["b"])
    assert edges(graph) == {"x": ["a", "b"], "b": ["c", "c", "d", "d"], "c": ["e"], "d": ["e"], "e": ["y"]}
    assert tensors["a"].outputs == []
    rewire([(nodes["c"], 1, tensors["a"]), (nodes["d"], 0, tensors["a"]), (nodes["d"], 1, tensors["x"])])
    assert edges(graph) == {"x": ["a", "b", "d"], "b": ["c"], "a": ["c", "d"], "c": ["e"], "d": ["e"], "e": ["y"]}
    nodes["e"].inputs[1] = tensors["c"]
    remove_nodes(graph, [nodes["d"], nodes["b"]])
    nodes["c"].inputs[0] = tensors["a"]
    assert edges(graph) == {"x": ["a"], "a": ["c", "c"], "c": ["e", "e"], "e": ["y"]}


def test_a_removed_node_takes_the_edges_of_its_subgraphs_along(parse: Any) -> None:
    graph = parse(BRANCHES.replace("THEN", "z = Add(a, x)").replace("ELSE", "z = Neg(a)"))
    tensors = graph.tensors()
    remove_nodes(graph, [graph.nodes[1]])
    assert tensors["a"].outputs == []
    assert [node.op for node in tensors["x"].outputs] == ["Abs"]


def test_fresh_names_are_new_in_every_scope(parse: Any) -> None:
    graph = parse(BRANCHES.replace("THEN", "z = Neg(a)").replace("ELSE", "w = Neg(a) z = Exp(w)"))
    fresh = fresh_names(graph)
    assert [fresh("w"), fresh("w"), fresh("a"), fresh("v"), fresh("v")] == ["w_1", "w_2", "a_1", "v", "v_1"]


def test_derived_values_are_made_anew_each_time() -> None:
    calls = []

    def make() -> Any:
        calls.append(1)
        return np.arange(6, dtype=np.float32).reshape(2, 3)

    constant = Constant("c", Derived(onnx.TensorProto.FLOAT, (2, 3), make))
    assert (constant.shape, constant.dtype, calls) == ((2, 3), np.float32, [])
    assert np.array_equal(load_values(constant), load_values(constant))
    assert len(calls) == 2
    graph = Graph(nodes=[Node("Neg", "n", inputs=[constant], outputs=[])])
    assert to_model(graph).graph.initializer[0].raw_data == make().tobytes()


def test_a_model_can_be_saved_over_its_own_source(tmp_path: Path) -> None:
    weight = np.arange(4096, dtype=np.float32).reshape(64, 64)
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    path = tmp_path / "model.onnx"
    save_model(from_model(model), path, inline_below=1)
    graph = load_model(path)
    (constant,) = constants(graph)
    held = load_values(constant)
    graph.inputs[0].name = "renamed"
    save_model(graph, path, inline_below=1)
    assert np.array_equal(held, weight)
    assert np.array_equal(load_values(next(constants(load_model(path)))), weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
