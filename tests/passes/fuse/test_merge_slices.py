from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.fuse.merge_slices import MergeSlices
from llmc.passes.graph import Graph, copy_graph, infer_shapes, to_model

PLACES = "".join(f"i{n} = Constant<value_ints = [{n}]>() " for n in (0, 1, 2, 4, 6, 8))
PLACES += "last = Constant<value_ints = [-1]>() far = Constant<value_ints = [9223372036854775807]>() "
PLACES += "back = Constant<value_ints = [-4]>() "
FIRES = {
    "halves of the last axis": ("y = Slice(x, i0, i4, last) z = Slice(x, i4, far, last)", "4 + 4"),
    "counted from the end, the other one first": (
        "y = Slice(x, back, far, i2, i1) z = Slice(x, i0, back, i2, i1)",
        "4 + 4",
    ),
    "of several sizes, one read twice": (
        "a = Slice(x, i0, i4, i2) b = Slice(x, i4, i6, i2) c = Slice(x, i6, i8, i2) y = Add(b, c) z = Mul(a, a)",
        "4 + 2 + 2",
    ),
    "beside one who reads all of it": (
        "a = Slice(x, i0, i4, last) b = Slice(x, i4, far, last) y = Add(a, b) z = Relu(x)",
        "4 + 4",
    ),
}
STAYS = {
    "a part is missing": (
        "y = Slice(x, i0, i4, i2) z = Slice(x, i4, i6, i2)", "the 8 of axis 2 are taken up to 6",
    ),
    "parts overlap": (
        "y = Slice(x, i0, i6, i2) z = Slice(x, i4, i8, i2)",
        "it takes 4 to 8 of axis 2, where others before it end at 6",
    ),
    "the same twice": (
        "y = Slice(x, i0, i8, i2) z = Slice(x, i0, i8, i2)",
        "it takes 0 to 8 of axis 2, where others before it end at 8",
    ),
    "in steps": ("y = Slice(x, i0, i8, i2, i2) z = Slice(x, i1, i8, i2, i2)", None),
    "an axis of any size": ("y = Slice(x, i0, i4, i1) z = Slice(x, i4, far, i1)", None),
    "two axes": ("y = Slice(x, i0, i4, i1) z = Slice(x, i4, far, i2)", None),
    "where is computed": ("n = ReduceSum<keepdims = 1>(at) y = Slice(x, i0, n, i2) z = Slice(x, n, far, i2)", None),
}  # fmt: skip


def build(parse: Any, body: str, opset: int = 18) -> Graph:
    graph: Graph = parse(
        f"(float[B,S,8] x, int64[N] at) => (float[U,V,W] y, float[C,D,E] z) {{ {PLACES} {body} }}", opset=opset
    )
    infer_shapes(graph)
    return graph


@pytest.mark.parametrize("opset", [13, 18, 24])
@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, opset: int, parse: Any) -> None:
    body, detail = FIRES[name]
    graph = build(parse, body, opset)
    merged = copy_graph(graph)
    result = MergeSlices().run(merged, Context())
    assert [(r.rule, r.detail) for r in result.rewrites] == [("slices", detail)]
    assert not {"Slice"} & {node.op for node in merged.nodes}
    onnx.checker.check_model(to_model(merged), full_check=True)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32), "at": np.array([2, 1])}
    found, expected = Session(merged).run(feeds), Session(graph).run(feeds)
    for output, value in expected.items():
        np.testing.assert_array_equal(found[output], value)


@pytest.mark.parametrize("name", STAYS)
def test_leaves_alone(name: str, parse: Any) -> None:
    body, reason = STAYS[name]
    graph = build(parse, body)
    before = to_model(graph)
    result = MergeSlices().run(graph, Context())
    assert result.rewrites == []
    assert [miss.reason for miss in result.near_misses] == ([] if reason is None else [reason])
    assert to_model(graph).graph.node == before.graph.node


def test_in_a_subgraph(parse: Any) -> None:
    graph = parse(
        f"""(float[B,8] x, bool c) => (float[B,4] y) {{ y = If (c) <
            then_branch = yes () => (float[B,4] t) {{ {PLACES} a = Slice(x, i0, i4, i1) b = Slice(x, i4, i8, i1)
                t = Mul(a, b) }},
            else_branch = no () => (float[B,4] e) {{ {PLACES} e = Slice(x, i0, i4, i1) }}> }}"""
    )
    infer_shapes(graph)
    before = copy_graph(graph)
    assert len(MergeSlices().run(graph, Context()).rewrites) == 1
    onnx.checker.check_model(to_model(graph), full_check=True)
    for condition in (True, False):
        feeds = {"x": np.arange(16, dtype=np.float32).reshape(2, 8), "c": np.array(condition)}
        np.testing.assert_array_equal(Session(graph).run(feeds)["y"], Session(before).run(feeds)["y"])


def test_stops_where_it_is_told(parse: Any) -> None:
    graph = build(parse, FIRES["halves of the last axis"][0])
    assert MergeSlices().run(graph, Context(Ledger(0))).rewrites == []
    assert [node.op for node in graph.nodes if node.op != "Constant"] == ["Slice", "Slice"]
