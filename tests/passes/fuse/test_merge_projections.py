from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.fuse.merge_projections import MergeProjections
from llmc.passes.graph import Array, Constant, Derived, Graph, copy_graph, infer_shapes, to_model

SIZES = {"B": 2, "S": 3, "T": 5, "P": 5, "M": 6}
WEIGHTS = {"wq": (8, 16), "wk": (8, 8), "wv": (8, 8), "bq": (16,), "bk": (8,), "bv": (8,)}
WEIGHTS |= {"nq": (16, 8), "nk": (8, 8), "row": (1, 8), "row4": (4,)}
ATTEND = "y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)"
BIASED = "a = MatMul(x, wq) q = Add(a, bq) b = MatMul(x, wk) k = Add(bk, b) c = MatMul(x, wv) v = Add(c, bv) "
PLAIN = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) "


def build(parse: Any, body: str, inputs: str = "float[B,S,8] x", outputs: str = "float[B,S,16] y") -> Graph:
    """The graph with random constants for the weights that the text names."""
    names = [name for name in WEIGHTS if re.search(rf"[( ]{name}[,)]", body)]
    declared = ", ".join(f"float[{','.join(map(str, WEIGHTS[name]))}] {name}" for name in names)
    graph = parse(f"({', '.join(filter(None, [inputs, declared]))}) => ({outputs}) {{ {body} }}", opset=24)
    rng = np.random.default_rng(0)
    for tensor in [t for t in graph.inputs if t.name in WEIGHTS]:
        tensor.to_constant(rng.standard_normal(tensor.shape).astype(np.float32))
    graph.inputs = [t for t in graph.inputs if not isinstance(t, Constant)]
    infer_shapes(graph)
    return graph


def feeds(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    shapes = {t.name: [n if isinstance(n, int) else SIZES[n] for n in t.shape] for t in graph.inputs}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def check_same(before: Graph, after: Graph) -> None:
    onnx.checker.check_model(to_model(after), full_check=True)
    given = feeds(before)
    # float32: sums of eight products of order 1, 2^-24 each, maybe in another order, seen through a Softmax
    found = Session(after).run(given)
    for name, value in Session(before).run(given).items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5)


HEADS = (
    "h = Constant<value_ints = [0,0,-1,4]>() qr = Reshape(q, h) kr = Reshape(k, h) vr = Reshape(v, h) "
    "qt = Transpose<perm=[0,2,1,3]>(qr) kt = Transpose<perm=[0,2,1,3]>(kr) vt = Transpose<perm=[0,2,1,3]>(vr) "
)
SPLIT = f"{HEADS} y = Attention(qt, kt, vt)"
FIRES = {
    "with biases": ((BIASED + ATTEND,), {"MatMul": 1, "Add": 1, "Split": 1, "Attention": 1}, [16, 8, 8]),
    "without": ((PLAIN + ATTEND,), {"MatMul": 1, "Split": 1, "Attention": 1}, [16, 8, 8]),
    "one bias is missing": (
        (BIASED.replace("b = MatMul(x, wk) k = Add(bk, b)", "k = MatMul(x, wk)") + ATTEND,),
        {"MatMul": 1, "Add": 1, "Split": 1, "Attention": 1},
        [16, 8, 8],
    ),
    "keys and values of another tensor": (
        (BIASED.replace("(x, wk)", "(z, wk)").replace("(x, wv)", "(z, wv)") + ATTEND, "float[B,S,8] x, float[B,T,8] z"),
        {"MatMul": 2, "Add": 2, "Split": 1, "Attention": 1},
        [8, 8],
    ),
    "rotation between": (
        (
            PLAIN.replace("q =", "p =") + "q = RotaryEmbedding<num_heads=4>(p, c, s) " + ATTEND,
            "float[B,S,8] x, float[B,S,2] c, float[B,S,2] s",
        ),
        {"MatMul": 1, "Split": 1, "RotaryEmbedding": 1, "Attention": 1},
        [16, 8, 8],
    ),
    "split into heads after": (
        (PLAIN + SPLIT, "float[B,S,8] x", "float[B,4,S,4] y"),
        {"MatMul": 1, "Split": 1, "Reshape": 1, "Transpose": 1, "Attention": 1},
        [4, 2, 2],
    ),
    "with a cache of keys and values": (
        (
            f"{PLAIN} {HEADS} kc = Concat<axis=2>(pk, kt) vc = TensorScatter<axis=2>(pv, vt) y = Attention(qt, kc, vc)",
            "float[B,S,8] x, float[B,2,P,4] pk, float[B,2,8,4] pv",
            "float[B,4,S,4] y",
        ),
        {"MatMul": 1, "Reshape": 1, "Transpose": 1, "Split": 1, "Concat": 1, "TensorScatter": 1, "Attention": 1},
        [4, 2, 2],
    ),
    "normalised before they are transposed": (
        (
            (PLAIN + SPLIT)
            .replace("qt =", "qn = RMSNormalization<axis=3>(qr, scale) qt =")
            .replace("(qr)", "(qn)")
            .replace("kt =", "kn = LayerNormalization(kr, scale) kt =")
            .replace("(kr)", "(kn)"),
            "float[B,S,8] x, float[4] scale",
            "float[B,4,S,4] y",
        ),
        {"MatMul": 1, "Reshape": 1, "Transpose": 1, "Split": 1, "RMSNormalization": 1, "LayerNormalization": 1}
        | {"Attention": 1},
        [4, 2, 2],
    ),
    "queries are used elsewhere too": (
        (PLAIN + ATTEND + " r = Relu(q)", "float[B,S,8] x", "float[B,S,16] y, float[B,S,16] r, float[B,S,16] q"),
        {"MatMul": 1, "Split": 1, "Relu": 1, "Attention": 1},
        [16, 8, 8],
    ),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any) -> None:
    arguments, counts, sizes = FIRES[name]
    graph = build(parse, *arguments)
    merged = copy_graph(graph)
    result = MergeProjections().run(merged, Context())
    assert Counter(n.op for n in merged.nodes) == counts
    (split,) = [n for n in merged.nodes if n.op == "Split"]
    assert split.inputs[1].values.tolist() == sizes
    rules = ["projections", "heads"] if "Transpose" in counts else ["projections"]
    assert [(r.number, r.rule) for r in result.rewrites] == list(enumerate(rules, 1))
    assert result.near_misses == []
    check_same(graph, merged)


ROWS = (
    "h = Constant<value_ints = [-1,3,4,4]>() g = Constant<value_ints = [-1,3,2,4]>() qr = Reshape(q, h) "
    "kr = Reshape(k, g) vr = Reshape(v, g) qt = Transpose<perm=[0,2,1,3]>(qr) kt = Transpose<perm=[0,2,1,3]>(kr) "
    "vt = Transpose<perm=[0,2,1,3]>(vr) y = Attention(qt, kt, vt)"
)
GEMMS = {
    "with and without biases": (
        "q = Gemm(x, wq, bq) k = Gemm(x, wk) v = Gemm(x, wv, bv) ", "float[M,8] x",
        {"MatMul": 1, "Add": 1, "Split": 1}, [16, 8, 8],
    ),
    "beside a MatMul": (
        "q = Gemm(x, wq) k = MatMul(x, wk) v = Gemm(x, wv) ", "float[M,8] x", {"MatMul": 1, "Split": 1}, [16, 8, 8],
    ),
    "transposed weights": (
        "q = Gemm<transB=1>(x, nq, bq) k = Gemm<transB=1, alpha=1.0>(x, nk, bk) v = Gemm(x, wv, bv) ", "float[M,8] x",
        {"MatMul": 1, "Add": 1, "Split": 1}, [16, 8, 8],
    ),
    "keys and values of another matrix": (
        "q = Gemm(z, wq) k = Gemm<transB=1>(x, nk) v = Gemm(x, wv) ", "float[M,8] z, float[M,8] x",
        {"MatMul": 1, "Split": 1, "Gemm": 1}, [8, 8],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GEMMS)
def test_gemm_is_merged(name: str, parse: Any) -> None:
    body, inputs, expected, sizes = GEMMS[name]
    graph = build(parse, body + ROWS, inputs, "float[B,4,S,4] y")
    merged = copy_graph(graph)
    result = MergeProjections().run(merged, Context())
    assert [r.rule for r in result.rewrites] == ["projections"], result.near_misses
    counts = Counter(n.op for n in merged.nodes)
    assert {op: counts[op] for op in ("MatMul", "Gemm", "Add", "Split") if counts[op]} == expected
    (split,) = [n for n in merged.nodes if n.op == "Split"]
    assert split.inputs[1].values.tolist() == sizes
    check_same(graph, merged)


GEMM_STAYS = {
    "alpha": ("v = Gemm<alpha=0.5>(x, wv, bv)", "Gemm 'gemm' of the values has alpha, beta or transA"),
    "a bias of another shape": ("v = Gemm(x, wv, row)", "'row', added to the values, is no bias of their width"),
}


@pytest.mark.parametrize("name", GEMM_STAYS)
def test_gemm_stays(name: str, parse: Any) -> None:
    values, reason = GEMM_STAYS[name]
    graph = build(parse, f"q = Gemm(x, wq) k = Gemm(x, wk) [gemm] {values} {ROWS}", "float[M,8] x", "float[B,4,S,4] y")
    result = MergeProjections().run(graph, Context())
    assert result.rewrites == []
    assert [miss.reason for miss in result.near_misses] == [reason]


APART = (
    "p, r = Split<axis=2, num_outputs=2>(x) h = Constant<value_ints=[0,0,-1,4]>() a = Reshape(p, h) b = Reshape(r, h) "
)
TURNED = "y = Transpose<perm=[0,2,1,3]>(a) z = Transpose<perm=[0,2,1,3]>(b)"
TWO = "float[B,2,S,4] y, float[B,2,S,4] z"
APART_FIRES = {
    "two parts of a model's own Split": (APART + TURNED, TWO, ["Reshape", "Transpose", "Split"]),
    "on the last of three axes": (APART.replace("axis=2", "axis=-1") + TURNED, TWO, ["Reshape", "Transpose", "Split"]),
    "rotated before they are heads": (
        APART.replace("a = Reshape(p, h)", "t = RotaryEmbedding<num_heads=2>(p, c, s) a = Reshape(t, h)") + TURNED,
        TWO,
        ["Reshape", "Transpose", "Split", "RotaryEmbedding"],
    ),
    "normalised as rows, and put together again": (
        APART.replace(
            "a = Reshape(p, h)",
            "rows = Constant<value_ints=[0,-1,4]>() i = Reshape(p, rows) n = RMSNormalization(i, row4) "
            "whole = Constant<value_ints=[0,-1,8]>() t = Reshape(n, whole) a = Reshape(t, h)",
        )
        + TURNED,
        TWO,
        ["Reshape", "Transpose", "Split", "RMSNormalization"],
    ),
    "their length is read": (
        f"{APART} {TURNED} length = Shape<start=1, end=2>(p)",
        f"{TWO}, int64[1] length",
        ["Reshape", "Transpose", "Split", "Shape"],
    ),
}
APART_STAYS = {
    "a part is used whole too": (
        f"{APART} {TURNED} [relu] t = Relu(p)", f"{TWO}, float[B,S,8] t",
        "'p', before it is split into heads, is an output or used twice",
    ),
    "a part is an output split into heads, too": (
        f"{APART} {TURNED}", f"{TWO}, float[B,S,2,4] a",
        "'a', before it is split into heads, is an output or used twice",
    ),
    "a part stays as it is": (
        f"{APART.replace('b = Reshape(r, h)', '[relu] z = Relu(r)')} y = Transpose<perm=[0,2,1,3]>(a)",
        "float[B,2,S,4] y, float[B,S,8] z", "'r' goes to Relu 'relu', where a Reshape to heads is needed",
    ),
    "another order of axes": (
        f"{APART} {TURNED.replace('y = Transpose<perm=[0,2,1,3]>', '[turn] y = Transpose<perm=[0,2,3,1]>')}",
        TWO.replace("float[B,2,S,4] y", "float[B,2,4,S] y"),
        "'p' goes to Transpose 'turn', where a Transpose of heads is needed",
    ),
    "heads of two sizes": (
        f"{APART.replace('b = Reshape(r, h)', 'i = Constant<value_ints=[0,0,-1,2]>() b = Reshape(r, i)')} {TURNED}",
        "float[B,2,S,4] y, float[B,4,S,2] z",
        "the parts of Split 'p' have heads of several sizes: 4, 2",
    ),
    "rotated as other heads": (
        APART.replace("a = Reshape(p, h)", "t = RotaryEmbedding<num_heads=4>(p, e, f) a = Reshape(t, h)") + TURNED,
        TWO,
        "'p' goes to Reshape 'a', where a Reshape to heads is needed",
    ),
    "their width is read": (
        f"{APART} {TURNED} [width] width = Shape<start=2>(p)", f"{TWO}, int64[1] width",
        "'p', before it is split into heads, is an output or used twice",
    ),
    "normalised over all heads": (
        APART.replace("b = Reshape(r, h)", "n = Reshape(r, h) [norm] b = LayerNormalization<axis=2>(n, s)") + TURNED,
        TWO,
        "LayerNormalization 'norm' is over more than each head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", APART_FIRES)
def test_heads_are_split_before_parts_are_taken_apart(name: str, parse: Any) -> None:
    body, outputs, operators = APART_FIRES[name]
    graph = build(parse, body, "float[B,S,16] x, float[B,S,2] c, float[B,S,2] s", outputs)
    changed = copy_graph(graph)
    result = MergeProjections().run(changed, Context())
    assert [(r.rule, r.detail) for r in result.rewrites] == [("heads", "2 + 2")]
    assert [n.op for n in changed.nodes if n.op != "Constant"] == operators
    check_same(graph, changed)


@pytest.mark.parametrize("name", APART_STAYS)
def test_heads_stay_apart(name: str, parse: Any) -> None:
    body, outputs, reason = APART_STAYS[name]
    graph = build(parse, body, "float[B,S,16] x, float[2,4] s, float[B,S,1] e, float[B,S,1] f", outputs)
    result = MergeProjections().run(graph, Context())
    assert result.rewrites == []
    assert [miss.reason for miss in result.near_misses] == [reason]


LEAVES_ALONE = {
    "keys and values of two tensors": (
        (PLAIN.replace("(x, wv)", "(z, wv)") + ATTEND, "float[B,S,8] x, float[B,S,8] z"),
        "keys are made of 'x', values of 'z'",
    ),
    "weight is computed": (
        ("w = Relu(wk) q = MatMul(x, wq) k = MatMul(x, w) v = MatMul(x, wv) " + ATTEND,),
        "the weight 'w' of the keys is no constant matrix",
    ),
    "weight is shared": (
        (PLAIN.replace("wv", "wk") + ATTEND,),
        "the weight 'wk' of the keys is used elsewhere too",
    ),
    "one product for keys and values": (
        ("q = MatMul(x, wq) k = MatMul(x, wk) y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, k)",),
        "two of its inputs are made by one product",
    ),
    "product without its bias is used": (
        (BIASED + ATTEND + " r = Relu(b)", "float[B,S,8] x", "float[B,S,16] y, float[B,S,8] r"),
        "'b', the keys without their bias, is used elsewhere too",
    ),
    "no bias of this width": (
        (BIASED.replace("Add(bk, b)", "Add(z, b)") + ATTEND, "float[B,S,8] x, float[8] z"),
        "'z', added to the keys, is no bias of their width",
    ),
    "no product": (
        ("q = Relu(x) k = MatMul(x, wk) v = MatMul(x, wv) y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v)",),
        "the queries come from Relu 'q', where MatMul or Gemm is needed",
    ),
}


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    arguments, reason = LEAVES_ALONE[name]
    graph = build(parse, *arguments)
    before = [n.op for n in graph.nodes]
    result = MergeProjections().run(graph, Context())
    assert result.rewrites == []
    assert [n.op for n in graph.nodes] == before
    assert [miss.reason for miss in result.near_misses] == [reason]


def test_merged_weights_are_not_held_in_memory(parse: Any) -> None:
    graph = build(parse, BIASED + ATTEND)
    MergeProjections().run(graph, Context())
    (weight,) = [t for n in graph.nodes if n.op == "MatMul" for t in n.inputs if isinstance(t, Constant)]
    assert isinstance(weight._values, Derived)
    assert tuple(weight.shape) == (8, 32)
    assert weight._values.load() is not weight._values.load()


def test_stops_after_the_last_allowed_rewrite(parse: Any) -> None:
    graph = build(parse, BIASED + ATTEND)
    result = MergeProjections().run(graph, Context(ledger=Ledger(stop_after=0)))
    assert result.rewrites == []
    assert len(graph.nodes) == 7
