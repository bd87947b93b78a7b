from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.fuse.unflatten_products import UnflattenProducts
from llmc.passes.graph import Constant, Graph, copy_graph, infer_shapes, to_model

WEIGHTS = {"w": (8, 6), "t": (6, 8), "b": (6,), "row": (1, 6), "one": (), "whole": (6, 6)}
ROWS = "flat = Constant<value_ints = [-1, 8]>() r = Reshape(x, flat) "
BACK = "d = Shape<end = 2>(x) n = Constant<value_ints = [6]>() s = Concat<axis = 0>(d, n) y = Reshape(p, s)"
SHAPE = ["Shape", "Concat"]
FIRES = {
    "a product": (f"{ROWS} p = MatMul(r, w) {BACK}", ["MatMul"]),
    "a product and its bias": (f"{ROWS} m = MatMul(r, w) p = Add(b, m) {BACK}", ["MatMul", "Add"]),
    "Gemm": (f"{ROWS} p = Gemm(r, w, b) {BACK}", ["MatMul", "Add"]),
    "Gemm without a bias": (f"{ROWS} p = Gemm(r, w) {BACK}", ["MatMul"]),
    "Gemm that transposes its weight": (f"{ROWS} p = Gemm<transB = 1>(r, t, row) {BACK}", ["MatMul", "Add"]),
    "Gemm that transposes what it is given": (
        f"{ROWS} u = Sin(t) p = Gemm<transB = 1>(r, u, one) {BACK}", ["Sin", "Transpose", "MatMul", "Add"],
    ),
    "Gemm without a bias, and one added": (f"{ROWS} m = Gemm(r, w) p = Add(m, b) {BACK}", ["MatMul", "Add"]),
    "two products of the same rows": (
        f"{ROWS} p = MatMul(r, w) {BACK.replace('y =', 'z =')} q = Gemm(r, w, b) o = Reshape(q, s) y = Add(z, o)",
        ["MatMul", "MatMul", "Add", "Add"],
    ),
}  # fmt: skip
STAYS = {
    "alpha": (f"{ROWS} [gemm] p = Gemm<alpha = 0.5>(r, w) {BACK}", "Gemm 'gemm' has alpha, beta or transA"),
    "other rows": (
        "flat = Constant<value_ints = [-1, 8]>() v = Transpose<perm=[0,2,1]>(x) [rows] r = Reshape(v, flat) "
        f"p = MatMul(r, w) {BACK}",
        "Reshape 'rows' makes [B*S, 8] of [B, 8, S]: not its rows",
    ),
    "put back in another order": (
        f"{ROWS} p = MatMul(r, w) e = Shape<start = 1, end = 2>(x) f = Shape<end = 1>(x) "
        "n = Constant<value_ints = [6]>() s = Concat<axis = 0>(e, f, n) [back] y = Reshape(p, s)",
        "Reshape 'back' makes [S, B, 6], where [B, S, 6] was",
    ),
    "a bias of the rows": (
        f"{ROWS} m = MatMul(r, w) p = Add(m, whole) {BACK}", "'whole' is no bias of the columns",
    ),
    "a weight of unknown shape": (
        f"{ROWS} g = Reshape(a, c) p = MatMul(r, g) {BACK}", "the shapes around it are not known",
    ),
    "rows are used elsewhere": (f"{ROWS} p = MatMul(r, w) q = Relu(p) {BACK}", None),
    "nothing was flattened": ("p = MatMul(x, w) y = Relu(p)", None),
}  # fmt: skip


def build(parse: Any, body: str) -> Graph:
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in WEIGHTS.items())
    declared = declared.replace("float[] one", "float one")
    extra = ", float[R] a, int64[N] c" if "(a, c)" in body else ""
    graph: Graph = parse(f"(float[B,S,8] x{extra}, {declared}) => (float[U,V,6] y) {{ {body} }}")
    rng = np.random.default_rng(0)
    for tensor in [t for t in graph.inputs if t.name in WEIGHTS]:
        tensor.to_constant(rng.standard_normal(tensor.shape).astype(np.float32))
    graph.inputs = [t for t in graph.inputs if not isinstance(t, Constant)]
    infer_shapes(graph)
    return graph


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any) -> None:
    body, operators = FIRES[name]
    graph = build(parse, body)
    changed = copy_graph(graph)
    result = UnflattenProducts().run(changed, Context())
    assert [node.op for node in changed.nodes if node.op not in SHAPE] == operators, result.near_misses
    onnx.checker.check_model(to_model(changed), full_check=True)
    x = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)
    # float32: sums of eight products of order 1, 2^-24 each, maybe in another order
    np.testing.assert_allclose(Session(changed).run({"x": x})["y"], Session(graph).run({"x": x})["y"], atol=1e-5)


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str, parse: Any) -> None:
    body, reason = STAYS[name]
    graph = build(parse, body)
    result = UnflattenProducts().run(graph, Context())
    assert result.rewrites == []
    assert [miss.reason for miss in result.near_misses] == ([] if reason is None else [reason])
