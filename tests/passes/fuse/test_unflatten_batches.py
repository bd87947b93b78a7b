from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.fuse.unflatten_products import UnflattenProducts
from llmc.passes.graph import Graph, copy_graph, infer_shapes, to_model

INPUTS = {
    "a": "B,2,3,4", "c": "B,2,4,5", "k": "B,2,5,4", "v": "B,2,5,4", "bias": "B,2,3,5", "mask": "B,1,3,5", "wide": "3,5",
    "row": "B,2,5", "long": "B,2,S,5",
}  # fmt: skip
VECTORS = {"left": (-1, 3, 4), "right": (-1, 4, 5), "rows": (-1, 5, 4), "flat": (-1, 3, 5), "back": (-1, 2, 3, 5)}
VECTORS |= {"out": (-1, 2, 3, 4), "turned": (-1, 3, 2, 5), "swapped": (-1, 2, 5, 3), "thin": (-1, 1, 5)}
VECTORS |= {"any": (-1,), "five": (5,), "four": (2, 4)}
CONSTANTS = ", ".join(f"int64[{len(v)}] {name} = {{{', '.join(map(str, v))}}}" for name, v in VECTORS.items())
BOTH = "p = Reshape(a, left) q = Reshape(c, right) "
PRODUCT = BOTH + "m = MatMul(p, q) "
BIAS = "e = Reshape(bias, flat) [magnitude] f = Abs(e) "
"""[2B, 3, 5], known to be that, from an operator that is not taken along."""
FIRES = {
    "a product": (PRODUCT + "y = Reshape(m, back)", ["MatMul"]),
    "the second one transposed and divided": (
        "p = Reshape(a, left) r = Reshape(k, rows) t = Transpose<perm = [0,2,1]>(r) d = Div(t, two) m = MatMul(p, d) "
        "y = Reshape(m, back)",
        ["Transpose", "Div", "MatMul"],
    ),
    "a bias of merged heads": (
        PRODUCT + BIAS + "s = Add(f, m) y = Reshape(s, back)", ["Reshape", "Abs", "Reshape", "MatMul", "Add"],
    ),
    "a scale, a cap and a difference": (
        PRODUCT + BIAS + "n = Mul(m, two) h = Tanh(n) s = Sub(f, h) d = Sub(two, s) y = Reshape(d, back)",
        ["Reshape", "Abs", "Reshape", "MatMul", "Mul", "Tanh", "Sub", "Sub"],
    ),
    "a row of merged heads, as ALiBi adds": (
        PRODUCT + "e = Reshape(row, thin) s = Add(m, e) y = Reshape(s, back)", ["Unsqueeze", "MatMul", "Add"],
    ),
    "a row that goes through something else": (
        PRODUCT + "e = Reshape(row, thin) f = Abs(e) s = Add(m, f) y = Reshape(s, back)",
        ["Reshape", "Abs", "Reshape", "MatMul", "Add"],
    ),
    "a sum with something else, transposed": (
        PRODUCT + BIAS + "s = Add(m, f) t = Transpose<perm = [0,2,1]>(s) y = Reshape(t, swapped)",
        ["Reshape", "Abs", "Reshape", "MatMul", "Add", "Transpose"],
    ),
    "scores, masked apart, and their product with values": (
        PRODUCT + "g = Reshape(m, back) n = Add(g, mask) f = Reshape(n, flat) w = Softmax(f) r = Reshape(v, rows) "
        "o = MatMul(w, r) y = Reshape(o, out)",
        ["MatMul", "Add", "Softmax", "MatMul"],
    ),
    "what was merged is used elsewhere too": (
        PRODUCT + "g = Reshape(m, back) u = ReduceMax(p) y = Add(g, u)", ["Reshape", "ReduceMax", "MatMul", "Add"],
    ),
}  # fmt: skip
STAYS = {
    "a product that is used elsewhere": (
        PRODUCT + "g = Reshape(m, back) u = ReduceMax(m) y = Add(g, u)",
        "'m', on one axis for batch and heads, is used elsewhere too",
    ),
    "a product of what is not taken along": (
        PRODUCT.replace("m =", "[cosine] n = Cos(q) m =").replace("(p, q)", "(p, n)") + "y = Reshape(m, back)",
        "Cos 'cosine' is not known to work on batch and heads apart",
    ),
    "split in another order": (
        PRODUCT + "t = Transpose<perm = [1,0,2]>(m) [turn] u = Transpose<perm = [1,0,2]>(t) y = Reshape(u, back)",
        "Transpose 'turn' is not known to work on batch and heads apart",
    ),
    "merged of other axes": (
        "t = Transpose<perm = [1,0,2,3]>(a) [merge] p = Reshape(t, left) q = Reshape(c, right) m = MatMul(p, q) "
        "y = Reshape(m, back)",
        "Reshape 'merge' does not merge batch and heads",
    ),
    "a Softmax over the rows": (
        PRODUCT + "[soft] s = Softmax<axis = 1>(m) y = Reshape(s, back)",
        "Softmax 'soft' is not known to work on batch and heads apart",
    ),
    "a sum that broadcasts": (
        PRODUCT + "[sum] s = Add(m, wide) y = Reshape(s, back)",
        "'wide' may not have the shape of what Add 'sum' makes",
    ),
    "a sum with something else of rows that are counted in each run": (
        "n = Shape<start = 2, end = 3>(long) f = Concat<axis = 0>(any, n, five) p = Reshape(long, f) "
        "q = Reshape(k, rows) m = MatMul(p, q) o = MatMul(p, q) w = Cos(o) s = Add(w, m) "
        "t = Transpose<perm = [0,2,1]>(s) g = Concat<axis = 0>(any, four, n) y = Reshape(t, g)",
        "how to split 'w' would have to be computed in each run",
    ),
    "a sum of nothing that was merged": (
        BIAS + "g = Abs(e) s = Add(f, g) y = Reshape(s, back)",
        "Abs 'magnitude' is not known to work on batch and heads apart",
    ),
    "other rows and columns": (PRODUCT + "y = Reshape(m, turned)", None),
    "no product": ("e = Reshape(bias, flat) f = Tanh(e) y = Reshape(f, back)", None),
}


def build(parse: Any, body: str) -> Graph:
    declared = ", ".join(f"float[{shape}] {name}" for name, shape in INPUTS.items())
    graph: Graph = parse(f"({declared}) => (float[U,V,W,X] y) <{CONSTANTS}, float two = {{2}}> {{ {body} }}")
    infer_shapes(graph)
    return graph


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any) -> None:
    body, operators = FIRES[name]
    graph = build(parse, body)
    changed = copy_graph(graph)
    result = UnflattenProducts().run(changed, Context())
    assert sorted(node.op for node in changed.nodes) == sorted(operators), result.near_misses
    onnx.checker.check_model(to_model(changed), full_check=True)
    rng = np.random.default_rng(0)
    symbols = {"B": 7, "S": 6}
    sizes = {name: [symbols.get(n) or int(n) for n in shape.split(",")] for name, shape in INPUTS.items()}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}
    # float32: sums of four or five products of order 1, 2^-24 each, maybe in another order
    np.testing.assert_allclose(Session(changed).run(feeds)["y"], Session(graph).run(feeds)["y"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str, parse: Any) -> None:
    body, reason = STAYS[name]
    graph = build(parse, body)
    before = [node.op for node in graph.nodes]
    result = UnflattenProducts().run(graph, Context())
    assert result.rewrites == []
    assert [node.op for node in graph.nodes] == before
    assert [miss.reason for miss in result.near_misses] == ([] if reason is None else [reason])


def test_a_product_that_is_given_back_stays(parse: Any) -> None:
    graph = build(parse, PRODUCT + "y = Reshape(m, back)")
    graph.outputs.append(graph.nodes[2].outputs[0])
    assert UnflattenProducts().run(graph, Context()).rewrites == []
