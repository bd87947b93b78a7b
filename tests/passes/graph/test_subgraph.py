from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from llmc.compiler.session import Session
from llmc.passes.graph import Array, Graph, constants, extract, from_model, metadata, module_of, reads, to_model

CHAIN = (
    "(float[N,4] x, float[N,4] mask) => (float[N,2] p, float[N,4] z) {"
    "a = Relu(x) b = MatMul(a, w) c = Add(b, mask) p, q = Split<axis = 1, num_outputs = 2>(c)"
    "s = Concat<axis = 1>(q, q) z = Mul(s, c) }"
)
BRANCHES = (
    "(bool q, float[2] x) => (float[2] y) { a = Abs(x) b = Neg(x) c = Exp(b) y = If(q) <"
    "then_branch = t () => (float[2] z) { z = Add(a, c) }, else_branch = e () => (float[2] w) { w = Neg(c) }> }"
)


def with_weight(size: int = 4) -> Graph:
    """CHAIN with a weight [size, size]."""
    text = CHAIN.replace("[N,4]", f"[N,{size}]").replace("[N,2]", f"[N,{size // 2}]")
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {text}')
    weight = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return from_model(model)


def check_part(graph: Graph, feeds: dict[str, Array], inputs: list[str], outputs: list[str]) -> Graph:
    """Extract, and compare what the part makes with what the whole graph makes: the same arithmetic, so exactly."""
    part = extract(graph, inputs, outputs)
    onnx.checker.check_model(to_model(part), full_check=True)
    whole = Session(graph, [*inputs, *outputs]).run(feeds, [*outputs, *(n for n in inputs if n not in feeds)])
    found = Session(part).run({**feeds, **whole})
    assert list(found) == outputs
    for name in outputs:
        np.testing.assert_array_equal(found[name], whole[name])
    return part


@pytest.mark.parametrize(
    ("inputs", "outputs", "operators"),
    [
        (["a"], ["b"], ["MatMul"]),
        (["b", "mask"], ["c"], ["Add"]),
        (["x", "mask"], ["z"], ["Relu", "MatMul", "Add", "Split", "Concat", "Mul"]),
        (["c"], ["z", "p"], ["Split", "Concat", "Mul"]),
        (["b", "mask"], ["c", "s"], ["Add", "Split", "Concat"]),
        (["c", "w"], ["p"], ["Split"]),
    ],
)
def test_only_what_lies_between_is_kept(
    inputs: list[str], outputs: list[str], operators: list[str], random_feeds: Any
) -> None:
    graph = with_weight()
    part = check_part(graph, random_feeds(graph), inputs, outputs)
    assert [node.op for node in part.nodes] == operators
    assert [tensor.name for tensor in part.inputs] == [name for name in inputs if name != "w"]


def test_a_result_that_is_an_input_now_is_not_made_twice(random_feeds: Any) -> None:
    graph = with_weight()
    part = extract(graph, ["p", "c"], ["s", "p"])
    onnx.checker.check_model(to_model(part), full_check=True)
    ((split, concat), c) = part.nodes, random_feeds(graph, seed=1)["x"]
    assert split.outputs[0].name != "p"
    assert concat.op == "Concat"
    found = Session(part).run({"c": c, "p": np.zeros((3, 2), np.float32)})
    np.testing.assert_array_equal(found["s"], np.concatenate([c[:, 2:], c[:, 2:]], 1))
    np.testing.assert_array_equal(found["p"], 0)


def test_weights_are_shared_and_names_types_and_metadata_stay() -> None:
    graph = with_weight(size=32)  # 4096 bytes: beyond what a proto holds inline
    metadata(graph.nodes[1])["pkg.torch.onnx.name_scopes"] = "['', 'encoder.layer.3', 'matmul']"
    part = extract(graph, ["a"], ["b"])
    (weight,), (original,) = constants(part), constants(graph)
    assert weight._values is original._values
    assert module_of(part.nodes[0]) == "encoder.layer.3"
    assert part.inputs[0].dtype == np.float32
    assert list(part.inputs[0].shape) == ["N", 32]
    assert part.opset == graph.opset
    part.nodes[0].name = "changed"
    assert graph.nodes[1].name != "changed"


@pytest.mark.parametrize("choice", [True, False])
def test_what_a_subgraph_captures_is_needed(choice: bool, parse: Any) -> None:
    graph = parse(BRANCHES)
    feeds = {"q": np.array(choice), "x": np.array([1.0, -2.0], np.float32)}
    part = check_part(graph, feeds, ["q", "a", "b"], ["y"])
    assert [node.op for node in part.nodes] == ["Exp", "If"]
    assert sorted(tensor.name for tensor in reads(part.nodes[1])) == ["a", "c", "c", "q"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        (["x"], ["c"], "'mask' is needed, and is not among the inputs"),
        (["nothing"], ["c"], "the graph has no tensor 'nothing' outside of subgraphs"),
        (["x"], ["zz"], "the graph has no tensor 'zz' outside of subgraphs"),
    ],
)
def test_what_cannot_be_cut_is_refused(inputs: list[str], outputs: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        extract(with_weight(), inputs, outputs)


def test_a_capture_outside_the_inputs_is_refused(parse: Any) -> None:
    with pytest.raises(ValueError, match="'x' is needed"):
        extract(parse(BRANCHES), ["q", "b"], ["y"])


def test_an_input_of_unknown_type_is_refused() -> None:
    graph = with_weight()
    graph.nodes[0].op, graph.nodes[0].domain = "Mystery", "example.com"
    with pytest.raises(ValueError, match="the type of 'a' is not known"):
        extract(graph, ["a"], ["b"])
