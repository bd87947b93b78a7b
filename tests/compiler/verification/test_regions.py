from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.verification.regions import Region, Side, changed_regions
from llmc.passes.graph import Constant, Graph, copy_graph, to_structure

CHAIN = (
    "(float[N,4] x) => (float[N,4] y) <float c = {2}, float d = {3}>"
    "{ a = Relu(x) b = Mul(a, c) e = Add(b, d) y = Neg(e) }"
)


def changes(before: Graph, after: Graph, **options: Any) -> list[tuple[list[str], list[str], tuple[str, ...]]]:
    def plain(region: Region) -> tuple[list[str], list[str], tuple[str, ...]]:
        return [n.op_type for n in region.gone], [n.op_type for n in region.new], region.outputs

    return [
        plain(region) for region in changed_regions(Side(to_structure(before)), Side(to_structure(after)), **options)
    ]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (CHAIN, []),
        (CHAIN.replace("Relu", "Abs"), [(["Relu"], ["Abs"], ("a",))]),
        (CHAIN.replace("c = {2}", "c = {4}"), [(["Mul"], ["Mul"], ("b",))]),
        (CHAIN.replace("(a, c)", "(a, d)"), [(["Mul"], ["Mul"], ("b",))]),
        (
            "(float[N,4] x) => (float[N,4] y) <float c = {2}, float d = {3}>"
            "{ a = Relu(x) B = Mul(a, c) e = Add(B, d) y = Neg(e) }",
            [(["Mul", "Add"], ["Mul", "Add"], ("e",))],
        ),
        (
            "(float[N,4] x) => (float[N,4] y) <float c = {2}, float d = {3}>"
            "{ a = Abs(x) b = Mul(a, c) e = Sub(b, d) y = Neg(e) }",
            [(["Relu"], ["Abs"], ("a",)), (["Add"], ["Sub"], ("e",))],
        ),
        (
            "(float[N,4] x) => (float[N,4] y) <float C = {2}, float d = {3}>"
            "{ a = Relu(x) b = Mul(a, C) e = Add(b, d) y = Neg(e) dead = Exp(a) }",
            [([], ["Exp"], ())],
        ),
    ],
    ids=["nothing", "operator", "constant", "another constant", "renamed within", "two", "dead"],
)  # fmt: skip
def test_what_differs(after: str, expected: Any, parse: Any) -> None:
    assert changes(parse(CHAIN), parse(after)) == expected


def test_a_large_weight_is_the_same_where_graphs_share_it(parse: Any) -> None:
    graph = parse("(float[N,32] x) => (float[N,32] y) { y = Relu(x) }")
    weight = Constant("w", np.ones((32, 32), np.float32))
    graph.nodes[0].op, graph.nodes[0].inputs = "MatMul", [*graph.nodes[0].inputs, weight]
    same = copy_graph(graph)
    assert changes(graph, same) == []
    same.nodes[0].inputs[1] = Constant("w", np.ones((32, 32), np.float32))
    assert changes(graph, same) == [(["MatMul"], ["MatMul"], ("y",))]


def test_what_a_subgraph_captures_counts_as_read(parse: Any) -> None:
    text = (
        "(float[2] x, bool c) => (float[2] z) { a = Relu(x) z = If (c) <then_branch = t () => (float[2] p)"
        "{ p = Neg(a) }, else_branch = e () => (float[2] q) { q = Abs(a) }> }"
    )
    assert changes(parse(text), parse(text.replace("Relu", "Exp"))) == [(["Relu"], ["Exp"], ("a",))]
    assert changes(parse(text), parse(text.replace("Neg", "Exp"))) == [(["If"], ["If"], ("z",))]


def test_a_reader_of_an_equal_tensor_is_the_same(parse: Any) -> None:
    """x + 0 taken out: its reader now reads x."""
    before = parse("(float[N,4] x) => (float[N,4] y) <float o = {0}> { a = Add(x, o) y = Neg(a) }")
    after = parse("(float[N,4] x) => (float[N,4] y) { y = Neg(x) }")
    assert changes(before, after) == [(["Add", "Neg"], ["Neg"], ("y",))]
    assert changes(before, after, equal=lambda a, b: (a, b) == ("a", "x")) == [(["Add"], [], ())]


def test_readers_of_a_moved_tensor_belong_to_the_region(parse: Any) -> None:
    before, after = parse(CHAIN), parse(CHAIN.replace("Relu", "Abs"))
    assert changes(before, after, moved={"a"}) == [(["Relu", "Mul"], ["Abs", "Mul"], ("b",))]


def test_an_operator_that_means_another_thing_at_another_opset_counts(parse: Any) -> None:
    text = "(float[4,4] x) => (float[4,4] y) { a = Relu(x) y = Hardmax(a) }"
    assert changes(parse(text, opset=12), parse(text, opset=13)) == [(["Relu", "Hardmax"], ["Relu", "Hardmax"], ("y",))]
    assert changes(parse(text, opset=13), parse(text, opset=14)) == [(["Relu"], ["Relu"], ("a",))]
