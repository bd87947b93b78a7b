from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.fuse.fuse_attention import FuseAttention
from llmc.passes.graph import Array, Graph, copy_graph, to_model
from llmc.passes.simplify.eliminate_dead import EliminateDead

SIZES = {"B": 2, "S": 3, "T": 5, "U": 5}
QKV = "float[B,4,S,8] q, float[B,4,T,8] k, float[B,4,T,8] v"
HEAD = (
    "({inputs}) => (float[B,4,S,8] y) <float half = {{0.5}}, float root = {{0.35355339}}, float eight = {{2.8284271}}, "
)
HEAD += "float low = {{-3.4028235e38}}, float zero = {{0}}, float inf = {{{inf}}}> {{{body}}}"
PLAIN = "kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) "
END = "w = Softmax<axis=-1>(m) y = MatMul(w, v)"
GUARD = "w = Softmax<axis=-1>(m) n = IsNaN(w) g = Where(n, zero, w) y = MatMul(g, v)"
GROUPS = (
    "ku = Unsqueeze(k, two) ke = Expand(ku, five) kr = Reshape(ke, four) "
    "vu = Unsqueeze(v, two) ve = Expand(vu, five) vr = Reshape(ve, four) "
    "kt = Transpose<perm=[0,1,3,2]>(kr) s = MatMul(q, kt) m = Mul(s, root) w = Softmax<axis=-1>(m) y = MatMul(w, vr)"
)
INDICES = (
    "from = Constant<value = int64 {0}>() by = Constant<value = int64 {1}>() last = Constant<value_ints = [-1]>() "
    "ns = Shape<start=2, end=3>(q) nt = Shape<start=2, end=3>(k) is = Squeeze(ns) it = Squeeze(nt) "
    "rs = Range(from, is, by) rt = Range(from, it, by) qi = Unsqueeze(rs, last) "
)


def model(body: str, inputs: str = QKV, inf: str = "0") -> str:
    return HEAD.format(inputs=inputs, body=body, inf=inf)


def feeds(graph: Graph, sizes: dict[str, int] = SIZES) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    given: dict[str, Array] = {}
    for tensor in graph.inputs:
        shape = [n if isinstance(n, int) else sizes[n] for n in tensor.shape]
        values = rng.standard_normal(shape)
        given[tensor.name] = (values > -0.5) if tensor.dtype == bool else values.astype(tensor.dtype)
        if tensor.dtype == bool and shape:
            given[tensor.name][..., 0] = True
    return given


FIRES: dict[str, tuple[str, dict[str, float], list[str]]] = {
    "product of scores": (model(PLAIN + "m = Mul(s, root) " + END), {}, []),
    "quotient of scores": (model(PLAIN + "m = Div(s, eight) " + END), {}, []),
    "another scale": (model(PLAIN + "m = Mul(half, s) " + END), {"scale": 0.5}, []),
    "no scale": (model(PLAIN.replace("s =", "m =") + END), {"scale": 1.0}, []),
    "scale of queries": (
        model("c = Mul(q, half) kt = Transpose<perm=[0,1,3,2]>(k) m = MatMul(c, kt) " + END),
        {"scale": 0.5},
        [],
    ),
    "square roots on both sides": (
        model("a = Mul(q, half) kt = Transpose<perm=[0,1,3,2]>(k) b = Mul(kt, half) m = MatMul(a, b) " + END),
        {"scale": 0.25},
        [],
    ),
    "scale of keys before their transposition": (
        model("b = Div(k, eight) kt = Transpose<perm=[0,1,3,2]>(b) m = MatMul(q, kt) " + END),
        {},
        [],
    ),
    "keys of another layout": (
        model(
            "kt = Transpose<perm=[0,2,3,1]>(k) m = MatMul(q, kt) " + END,
            "float[B,4,S,8] q, float[B,T,4,8] k, float[B,4,T,8] v",
        ),
        {"scale": 1.0},
        ["Transpose"],
    ),
    "keys transposed in batches": (
        model(
            "r = Constant<value_ints = [-1, 5, 8]>() t = Constant<value_ints = [2, 4, 8, 5]>()"
            "a = Reshape(k, r) b = Transpose<perm=[0,2,1]>(a) kt = Reshape(b, t) m = MatMul(q, kt) " + END,
            "float[2,4,S,8] q, float[2,4,5,8] k, float[2,4,5,8] v",
        ).replace("float[B,4,S,8] y", "float[2,4,S,8] y"),
        {"scale": 1.0},
        [],
    ),
    "keys that never were another way": (
        model("m = MatMul(q, k) " + END, "float[B,4,S,8] q, float[B,4,8,T] k, float[B,4,T,8] v"),
        {"scale": 1.0},
        ["Transpose"],
    ),
    "mask chosen by a boolean and added": (
        model(PLAIN + "c = Mul(s, root) b = Where(u, zero, low) m = Add(c, b) " + END, QKV + ", bool[B,1,S,T] u"),
        {},
        ["Where"],
    ),
    "mask of one row": (
        model(PLAIN + "c = Mul(s, root) b = Where(u, zero, low) m = Add(b, c) " + END, QKV + ", bool[B,1,1,T] u"),
        {},
        ["Concat", "Expand", "Shape", "Shape", "Where"],
    ),
    "mask whose columns are called something else": (
        model(PLAIN + "c = Mul(s, root) b = Where(u, zero, low) m = Add(c, b) " + END, QKV + ", bool[B,1,S,U] u"),
        {},
        ["Concat", "Expand", "Shape", "Shape", "Where"],
    ),
    "mask of rank two": (
        model(PLAIN + "c = Mul(s, root) b = Where(u, low, zero) m = Add(c, b) " + END, QKV + ", bool[S,T] u"),
        {},
        ["Where"],
    ),
    "numbers in place of scores": (
        model(PLAIN + "c = Mul(s, root) m = Where(u, c, low) " + END, QKV + ", bool[B,1,S,T] u"),
        {},
        ["Where"],
    ),
    "scale after the mask": (
        model(PLAIN + "b = Where(u, zero, low) c = Add(s, b) m = Mul(c, half) " + END, QKV + ", bool[B,1,S,T] u"),
        {"scale": 0.5},
        ["Mul", "Where"],
    ),
    "scale after numbers in place of scores": (
        model(PLAIN + "c = Where(u, s, low) m = Mul(c, half) " + END, QKV + ", bool[B,1,S,T] u"),
        {"scale": 0.5},
        ["Where"],
    ),
    "scale after a bias and before a mask, as Falcon adds ALiBi": (
        model(
            "p = Mul(n, half) " + PLAIN + "a = Add(s, p) c = Mul(a, root) b = Where(u, zero, low) m = Add(c, b) " + END,
            QKV + ", float[B,4,1,T] n, bool[B,1,S,T] u",
        ),
        {},
        ["Add", "Mul", "Mul", "Where"],
    ),
    "two masks": (
        model(
            PLAIN
            + "c = Mul(s, root) b = Where(u, zero, low) d = Add(c, b) e = Where(o, zero, low) m = Add(d, e) "
            + END,
            QKV + ", bool[B,1,S,T] u, bool[S,T] o",
        ),
        {},
        ["Add", "Where", "Where"],
    ),
    "guarded": (
        model(
            PLAIN + "c = Mul(s, root) b = Where(u, zero, inf) m = Add(c, b) " + GUARD, QKV + ", bool[B,1,S,T] u", "-inf"
        ),
        {},
        [],
    ),
    "guarded, dropping": (
        model(PLAIN + "c = Mul(s, root) m = Where(u, inf, c) " + GUARD, QKV + ", bool[B,1,S,T] u", "-inf"),
        {},
        ["Not"],
    ),
    "guarded by the rows of the mask": (
        model(
            "neg = Constant<value_ints = [-1]>() " + PLAIN + "c = Mul(s, root) m = Add(c, b) w = Softmax<axis=-1>(m) "
            "top = ReduceMax<keepdims=1>(b, neg) none = Equal(top, inf) g = Where(none, zero, w) y = MatMul(g, v)",
            QKV + ", float[B,1,S,T] b",
            "-inf",
        ),
        {},
        [],
    ),
    "guarded by a constant": (
        model(
            "never = Constant<value = bool[1,1] {0}>() " + PLAIN + "m = Mul(s, root) w = Softmax<axis=-1>(m) "
            "g = Where(never, zero, w) y = MatMul(g, v)"
        ),
        {},
        [],
    ),
    "causal by comparison": (
        model(INDICES + PLAIN + "le = LessOrEqual(rt, qi) m = Where(le, s, inf) " + END, inf="-inf"),
        {"is_causal": 1, "scale": 1.0},
        [],
    ),
    "causal by the opposite comparison": (
        model(INDICES + PLAIN + "gt = Greater(rt, qi) b = Where(gt, low, zero) m = Add(s, b) " + END),
        {"is_causal": 1, "scale": 1.0},
        [],
    ),
    "causal by Trilu": (
        model(
            "ns = Shape<start=2, end=3>(q) nt = Shape<start=2, end=3>(k) nn = Concat<axis=0>(ns, nt)"
            "ones = ConstantOfShape<value = int64[1] {1}>(nn) tri = Trilu<upper=0>(ones) b = Cast<to=9>(tri)"
            + PLAIN
            + "m = Where(b, s, inf) "
            + END,
            inf="-inf",
        ),
        {"is_causal": 1, "scale": 1.0},
        [],
    ),
    "causal by a constant": (
        model(
            "tri = Constant<value = bool[2,3] {1, 0, 0, 1, 1, 0}>()" + PLAIN + "m = Where(tri, s, inf) " + END,
            "float[B,4,2,8] q, float[B,4,3,8] k, float[B,4,3,8] v",
            "-inf",
        ).replace("float[B,4,S,8] y", "float[B,4,2,8] y"),
        {"is_causal": 1, "scale": 1.0},
        [],
    ),
    "groups of heads": (
        model(
            "two = Constant<value_ints = [2]>() five = Constant<value_ints = [1,1,2,1,1]>()"
            "four = Constant<value_ints = [0,4,-1,8]>() " + GROUPS,
            "float[B,4,S,8] q, float[B,2,T,8] k, float[B,2,T,8] v",
        ),
        {},
        [],
    ),
    "one head, no axis for it": (
        model(
            "kt = Transpose<perm=[0,2,1]>(k) s = MatMul(q, kt) c = Mul(s, root) b = Where(u, zero, low) m = Add(c, b) "
            + END,
            "float[B,S,8] q, float[B,T,8] k, float[B,T,8] v, bool[B,S,T] u",
        ).replace("float[B,4,S,8] y", "float[B,S,8] y"),
        {"q_num_heads": 1, "kv_num_heads": 1},
        ["Unsqueeze", "Where"],
    ),
}


def check_same(before: Graph, after: Graph, given: dict[str, Array]) -> None:
    onnx.checker.check_model(to_model(after), full_check=True)
    # float32: sums of at most 32 products of order 1 in another order, 2^-24 each
    np.testing.assert_allclose(Session(after).run(given)["y"], Session(before).run(given)["y"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any) -> None:
    text, attributes, others = FIRES[name]
    graph = parse(text)
    fused = copy_graph(graph)
    result = FuseAttention().run(fused, Context())
    (attention,) = [n for n in fused.nodes if n.op == "Attention"]
    assert sorted(n.op for n in fused.nodes if n.op != "Attention") == others
    assert dict(attention.attrs) == pytest.approx(attributes, rel=1e-6)
    assert fused.opset == 23
    assert {r.rule for r in result.rewrites} == {"attention"}
    check_same(graph, fused, feeds(graph))


UNGUARDED = model(PLAIN + "b = Where(u, zero, inf) m = Add(s, b) " + END, QKV + ", bool[B,1,S,T] u", "-inf")
LEAVES_ALONE = {
    "row that may be NaN": (UNGUARDED, "'u' masks with -inf: a row masked everywhere is NaN here and 0 in Attention"),
    "mask of unknown numbers": (
        model(PLAIN + "m = Add(s, b) " + END, QKV + ", float[B,1,S,T] b"),
        "'b' masks with -inf: a row masked everywhere is NaN here and 0 in Attention",
    ),
    "Softmax over another axis": (
        model(PLAIN + "w = Softmax<axis=1>(s) y = MatMul(w, v)"),
        "it is over axis 1, not the last one",
    ),
    "weights are an output": (
        model(PLAIN + "w = Softmax<axis=-1>(s) y = MatMul(w, v)").replace("8] y)", "8] y, float[B,4,S,T] w)"),
        "'w', inside the pattern, is an output of the graph",
    ),
    "weights are used twice": (
        model(PLAIN + "w = Softmax<axis=-1>(s) y = MatMul(w, v) z = Relu(w)").replace(
            "8] y)", "8] y, float[B,4,S,T] z)"
        ),
        "'w', inside the pattern, is used by MatMul 'y', Relu 'z'",
    ),
    "no values": (
        model(PLAIN + "w = Softmax<axis=-1>(s) r = Relu(w) y = MatMul(r, v)"),
        "the result of Softmax 'w' goes to Relu 'r', where MatMul is needed",
    ),
    "no product": (
        model("c = Relu(x) w = Softmax<axis=-1>(c) y = MatMul(w, v)", QKV + ", float[B,4,S,T] x"),
        "the scores come from Relu 'c', where MatMul, a scale or a mask is needed",
    ),
    "scale over 1 after the mask": (
        model(PLAIN + "b = Where(u, zero, low) c = Add(s, b) m = Mul(c, eight) " + END, QKV + ", bool[B,1,S,T] u"),
        "the scale of 2.82843 comes after the mask of Add 'c'",
    ),
    "a fill that leaves weight once scaled": (
        model(
            "few = Constant<value_float = -10000.0>() " + PLAIN + "c = Where(u, s, few) m = Mul(c, half) " + END,
            QKV + ", bool[B,1,S,T] u",
        ),
        "-5000 stands for masked scores: that leaves them some weight",
    ),
    "mask of unknown numbers, scaled": (
        model(PLAIN + "a = Add(s, b) m = Mul(a, half) " + END, QKV + ", float[B,1,S,T] b"),
        "'b' masks with -inf: a row masked everywhere is NaN here and 0 in Attention",
    ),
    "a fill that leaves weight": (
        model(PLAIN + "m = Where(u, s, half) " + END, QKV + ", bool[B,1,S,T] u"),
        "0.5 stands for masked scores: that leaves them some weight",
    ),
    "mask that may not broadcast": (
        model(PLAIN + "b = Where(u, zero, low) m = Add(s, b) " + END, QKV + ", bool[B,1,U,T] u"),
        "the mask 'u' [B, 1, U, T] may not broadcast to [B, 4, S, T]",
    ),
    "batches that may differ": (
        model(PLAIN.replace("s =", "m =") + END, "float[B,4,S,8] q, float[C,4,T,8] k, float[C,4,T,8] v"),
        "the batch of the keys is C, where B is needed",
    ),
    "guarded by the rows of something else": (
        model(
            "neg = Constant<value_ints = [-1]>() " + PLAIN + "m = Add(s, b) w = Softmax<axis=-1>(m) "
            "top = ReduceMax<keepdims=1>(d, neg) none = Equal(top, inf) g = Where(none, zero, w) y = MatMul(g, v)",
            QKV + ", float[B,1,S,T] b, float[B,1,S,T] d",
            "-inf",
        ),
        "rows are made 0 by 'd', which is not the mask",
    ),
    "heads of values": (
        model(PLAIN.replace("s =", "m =") + END, "float[B,4,S,8] q, float[B,4,T,8] k, float[B,1,T,8] v"),
        "the heads of the values is 1, where 4 is needed",
    ),
    "rank two": (
        "(float[S,8] q, float[8,T] k, float[T,8] v) => (float[S,8] y)"
        "{ s = MatMul(q, k) w = Softmax<axis=-1>(s) y = MatMul(w, v) }",
        "it has rank 2, not 3 or 4",
    ),
}


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = parse(text)
    before = [n.op for n in graph.nodes]
    result = FuseAttention().run(graph, Context())
    assert result.rewrites == []
    assert [n.op for n in graph.nodes] == before
    assert graph.opset == 20
    assert [miss.reason.partition(";")[0] for miss in result.near_misses] == [reason]


def test_half_precision_with_a_softmax_in_float32(parse: Any) -> None:
    body = "c1 = Cast<to=10>(root) c2 = Cast<to=10>(low) c3 = Cast<to=10>(zero) " + PLAIN
    body += "c = Mul(s, c1) b = Where(u, c3, c2) m = Add(c, b) f = Cast<to=1>(m) w = Softmax<axis=-1>(f) "
    text = model(body + "h = Cast<to=10>(w) y = MatMul(h, v)", QKV + ", bool[B,1,S,T] u").replace(
        "-3.4028235e38", "-65504"
    )
    graph = parse(text.replace("float[B", "float16[B"))
    fused = copy_graph(graph)
    FuseAttention().run(fused, Context())
    assert Counter(n.op for n in fused.nodes) == {"Attention": 1, "Where": 1}
    given = feeds(graph)
    before, after = (Session(g).run(given)["y"].astype(np.float32) for g in (graph, fused))
    # float16 has 11 bits; the long form rounds five times on values of order 1
    np.testing.assert_allclose(after, before, rtol=0, atol=5 * 2.0**-11)


CAPPED = "c = Mul(s, root) d = Div(c, eight) t = Tanh(d) e = Mul(t, eight) b = Where(u, zero, low) m = Add(e, b) "


def test_may_be_told_to_take_capped_scores(parse: Any) -> None:
    graph = parse(model(PLAIN + CAPPED + END, QKV + ", bool[B,1,S,T] u"))
    (miss,) = FuseAttention().run(graph, Context()).near_misses
    assert miss.reason.startswith("its scores are capped at 2.82843, which TensorRT's attention does not do")
    fused = copy_graph(graph)
    FuseAttention(softcap=True).run(fused, Context())
    assert Counter(n.op for n in fused.nodes) == {"Attention": 1, "Where": 1}
    (attention,) = (n for n in fused.nodes if n.op == "Attention")
    assert attention.attrs["softcap"] == pytest.approx(8**0.5)
    given = feeds(graph)
    given["q"] *= 9  # so that the cap shows
    expected = Session(graph).run(given)["y"]
    np.testing.assert_allclose(Session(fused).run(given)["y"], expected, atol=1e-5)  # float32, as above


def test_a_cap_behind_the_mask_is_another_function(parse: Any) -> None:
    body = "b = Where(u, zero, low) a = Add(s, b) t = Tanh(a) m = Mul(t, eight) "
    graph = parse(model(PLAIN + body + END, QKV + ", bool[B,1,S,T] u"))
    (miss,) = FuseAttention(softcap=True).run(graph, Context()).near_misses
    assert miss.reason == "its scores are masked by Add 'a' before they are capped"


def test_may_be_told_to_make_masked_rows_zero(parse: Any) -> None:
    graph = parse(UNGUARDED)
    FuseAttention(zero_masked_rows=True).run(graph, Context())
    given = feeds(graph) | {"u": np.zeros((2, 1, 3, 5), dtype=np.bool_)}
    assert Counter(n.op for n in graph.nodes) == {"Attention": 1}
    assert not Session(graph).run(given)["y"].any()


def test_a_row_masked_with_finite_numbers_stays_the_mean_of_the_values(parse: Any) -> None:
    graph = parse(FIRES["mask chosen by a boolean and added"][0])
    FuseAttention().run(graph, Context())
    given = feeds(graph) | {"u": np.zeros((2, 1, 3, 5), dtype=np.bool_)}
    mean = np.broadcast_to(given["v"].mean(axis=2, keepdims=True), (2, 4, 3, 8))
    np.testing.assert_allclose(Session(graph).run(given)["y"], mean, atol=1e-6)  # float32, five values


def test_a_row_masked_everywhere_before_the_scale_stays_the_mean_of_the_values(parse: Any) -> None:
    graph = parse(FIRES["scale after the mask"][0])
    FuseAttention().run(graph, Context())
    given = feeds(graph) | {"u": np.zeros((2, 1, 3, 5), dtype=np.bool_)}
    mean = np.broadcast_to(given["v"].mean(axis=2, keepdims=True), (2, 4, 3, 8))
    np.testing.assert_allclose(Session(graph).run(given)["y"], mean, atol=1e-6)  # float32, five values


def test_a_row_masked_with_the_lowest_number_added_is_as_it_was(parse: Any) -> None:
    body = "one = Constant<value_float = 1.0>() n = Sub(one, u) b = Mul(n, low) m = Add(s, b) "
    graph = parse(model(PLAIN + body + END, QKV + ", float[B,1,S,T] u"))
    fused = copy_graph(graph)
    FuseAttention().run(fused, Context())
    assert Counter(n.op for n in fused.nodes)["Attention"] == 1
    given = feeds(graph) | {"u": np.ones((2, 1, 3, 5), np.float32)}
    given["u"][0, :, 1] = 0
    given["u"][1, :, :, :2] = 0
    expected = Session(graph).run(given)["y"]
    np.testing.assert_allclose(expected[0, :, 1], given["v"][0].mean(axis=1), atol=1e-6)  # float32, five values
    np.testing.assert_allclose(Session(fused).run(given)["y"], expected, atol=1e-5)


# Heads

X = "float[B,S,32] q, float[B,T,16] k, float[B,T,16] v"
SPLIT = (
    "qh = Constant<value_ints = [0,0,4,8]>() kh = Constant<value_ints = [0,0,2,8]>() "
    "qr = Reshape(q, qh) kr = Reshape(k, kh) vr = Reshape(v, kh) "
    "qt = Transpose<perm=[0,2,1,3]>(qr) kt = Transpose<perm=[0,2,1,3]>(kr) vt = Transpose<perm=[0,2,1,3]>(vr) "
)
ATTEND = "a = Attention(qt, kt, vt) t = Transpose<perm=[0,2,1,3]>(a) "
FLAT = "all = Constant<value_ints = [0,0,32]>() y = Reshape(t, all)"


def heads(body: str, inputs: str = X, outputs: str = "float[B,S,32] y") -> str:
    return f"({inputs}) => ({outputs}) {{ {body} }}"


REPEATED = (
    "qh = Constant<value_ints = [0,0,4,8]>() qr = Reshape(q, qh) qt = Transpose<perm=[0,2,1,3]>(qr) "
    "one = Constant<value_ints = [0,0,2,1,8]>() twice = Constant<value_ints = [1,1,1,2,1]>() "
    "three = Constant<value_ints = [3]>() "
    "ku = Reshape(k, one) ke = Expand(ku, twice) km = Reshape(ke, qh) kt = Transpose<perm=[0,2,1,3]>(km) "
    "vu = Reshape(v, one) ve = Expand(vu, twice) vm = Reshape(ve, qh) vt = Transpose<perm=[0,2,1,3]>(vm) "
    "ko = RotaryEmbedding(kt, c, z) "
)
"""As Falcon groups its heads: keys and values are repeated behind the sequence, then brought to the front; turned."""
ROTATED = ", float[B,T,4] c, float[B,T,4] z"
FOLDS = {
    "keys repeated, then turned": (
        heads(REPEATED + ATTEND.replace("kt", "ko") + FLAT, X + ROTATED),
        ["Attention", "RotaryEmbedding"],
    ),
    "keys repeated, then a part of each turned": (
        heads(
            REPEATED.replace("Embedding(", "Embedding<rotary_embedding_dim = 4, num_heads = 4>(")
            + ATTEND.replace("kt", "ko")
            + FLAT,
            X + ROTATED.replace("4]", "2]"),
        ),
        ["Attention", "RotaryEmbedding"],
    ),
    "keys that came as heads repeated, then turned": (
        heads(
            REPEATED.replace("Reshape(k, one)", "Unsqueeze(k, three)") + ATTEND.replace("kt", "ko") + FLAT,
            X.replace("T,16] k", "T,2,8] k") + ROTATED,
        ),
        ["Attention", "Reshape", "RotaryEmbedding"],
    ),
    "keys that came with an axis to repeat, then turned": (
        heads(
            REPEATED.replace("ku = Reshape(k, one)", "ku = Relu(k)") + ATTEND.replace("kt", "ko") + FLAT,
            X.replace("T,16] k", "T,2,1,8] k") + ROTATED,
        ),
        ["Attention", "Relu", "Reshape", "RotaryEmbedding", "Squeeze"],
    ),
    "Attention of the exporter": (heads(SPLIT + ATTEND + FLAT), ["Attention"]),
    "shapes computed in every run": (
        heads(
            "b = Shape<start=0, end=1>(q) s = Shape<start=1, end=2>(q) n = Shape<start=1, end=2>(k) "
            "rest = Constant<value_ints = [-1]>() d = Constant<value_ints = [8]>() "
            "qh = Concat<axis=0>(b, s, rest, d) kh = Concat<axis=0>(b, n, rest, d) whole = Concat<axis=0>(b, s, rest) "
            + SPLIT[SPLIT.index("qr") :]
            + ATTEND
            + "y = Reshape(t, whole)"
        ),
        ["Attention"],
    ),
    "result in rows": (
        heads(SPLIT + ATTEND + "rows = Constant<value_ints = [-1,32]>() y = Reshape(t, rows)", outputs="float[N,32] y"),
        ["Attention", "Reshape"],
    ),
    "result that stays in heads": (
        heads(SPLIT + ATTEND + "y = Relu(t)", outputs="float[B,S,4,8] y"),
        ["Attention", "Relu", "Reshape"],
    ),
    "result that is an output in heads": (
        heads(SPLIT + ATTEND.replace(" t =", " y ="), outputs="float[B,S,4,8] y"),
        ["Attention", "Reshape"],
    ),
    "rotation between": (
        heads(
            SPLIT + "qo = RotaryEmbedding(qt, c, z) a = Attention(qo, kt, vt) t = Transpose<perm=[0,2,1,3]>(a) " + FLAT,
            X + ", float[B,S,4] c, float[B,S,4] z",
        ),
        ["Attention", "RotaryEmbedding"],
    ),
    "queries that were never flat": (
        heads(
            SPLIT.replace("qr = Reshape(q, qh)", "qr = Relu(q)") + ATTEND + FLAT, X.replace("B,S,32] q", "B,S,4,8] q")
        ),
        ["Attention", "Relu", "Reshape"],
    ),
    "scale before the split": (
        heads("half = Constant<value = float {0.5}>() x = Mul(q, half) " + SPLIT.replace("(q,", "(x,") + ATTEND + FLAT),
        ["Attention"],
    ),
    "keys repeated for groups": (
        heads(
            SPLIT
            + "two = Constant<value_ints = [2]>() five = Constant<value_ints = [1,1,2,1,1]>() "
            + "four = Constant<value_ints = [0,4,-1,8]>() "
            + "ku = Unsqueeze(kt, two) ke = Expand(ku, five) ks = Reshape(ke, four) "
            + "vu = Unsqueeze(vt, two) ve = Expand(vu, five) vs = Reshape(ve, four) "
            + "a = Attention(qt, ks, vs) t = Transpose<perm=[0,2,1,3]>(a) "
            + FLAT
        ),
        ["Attention"],
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds_heads(name: str, parse: Any) -> None:
    text, operators = FOLDS[name]
    graph = parse(text, opset=23)
    fused = copy_graph(graph)
    result = FuseAttention().run(fused, Context())
    assert result.near_misses == []
    assert sorted(n.op for n in fused.nodes) == operators
    (attention,) = [n for n in fused.nodes if n.op == "Attention"]
    assert (attention.attrs["q_num_heads"], attention.attrs["kv_num_heads"]) == (4, 2)
    check_same(graph, fused, feeds(graph))


KEEPS_HEADS = {
    "repeated keys are used elsewhere behind their rotation": (
        heads(
            REPEATED + ATTEND.replace("kt", "ko") + FLAT + " r = Relu(ko)",
            X + ROTATED,
            "float[B,S,32] y, float[B,4,T,8] r",
        ).replace("ko = Rotary", "[turn] ko = Rotary"),
        "the result of RotaryEmbedding 'turn' is used elsewhere, split into heads",
    ),
    "result is an output": (
        heads(SPLIT + "y = Attention(qt, kt, vt)", outputs="float[B,4,S,8] y"),
        "'y', split into heads, is an output of the graph or used twice",
    ),
    "result is used in heads": (
        heads(SPLIT + "a = Attention(qt, kt, vt) y = Relu(a)", outputs="float[B,4,S,8] y"),
        "its result goes to Relu 'y', where a Transpose of heads is needed",
    ),
    "values come in heads": (
        heads(SPLIT.replace("vt =", "unused =") + ATTEND + FLAT, X + ", float[B,2,T,8] vt"),
        "'vt' comes from no node, where a Transpose of heads is needed",
    ),
    "number of heads": (
        heads(
            "a = Attention(q, k, v) y = Transpose<perm=[0,2,1,3]>(a)",
            "float[B,H,S,8] q, float[B,H,T,8] k, float[B,H,T,8] v",
            "float[B,S,H,8] y",
        ),
        "the number of heads of 'q' is not known",
    ),
}


@pytest.mark.parametrize("name", KEEPS_HEADS)
def test_keeps_heads(name: str, parse: Any) -> None:
    text, reason = KEEPS_HEADS[name]
    graph = parse(text, opset=23)
    before = [n.op for n in graph.nodes]
    result = FuseAttention().run(graph, Context())
    assert [miss.reason for miss in result.near_misses] == [reason]
    assert [n.op for n in graph.nodes] == before


def test_layers_share_one_mask(parse: Any) -> None:
    layer = (
        "{0}t = Transpose<perm=[0,1,3,2]>(k) {0}s = MatMul({1}, {0}t) {0}c = Mul({0}s, root) {0}m = Add({0}c, b) "
        "{0}w = Softmax<axis=-1>({0}m) {2} = MatMul({0}w, v) "
    )
    body = "b = Where(u, zero, low) " + layer.format("a", "q", "x") + layer.format("z", "x", "y")
    graph = parse(model(body, QKV + ", bool[B,1,1,T] u"))
    fused = copy_graph(graph)
    result = FuseAttention().run(fused, Context())
    assert [r.number for r in result.rewrites] == [1, 2]
    assert Counter(n.op for n in fused.nodes) == {"Attention": 2, "Where": 1, "Expand": 1, "Shape": 2, "Concat": 1}
    check_same(graph, fused, feeds(graph))


def test_stops_after_the_last_allowed_rewrite(parse: Any) -> None:
    text = heads(
        SPLIT + "ks = Transpose<perm=[0,1,3,2]>(kt) s = MatMul(qt, ks) w = Softmax<axis=-1>(s) a = MatMul(w, vt) "
        "t = Transpose<perm=[0,2,1,3]>(a) " + FLAT,
        X.replace("16", "32"),
    ).replace("kh = Constant<value_ints = [0,0,2,8]>", "kh = Constant<value_ints = [0,0,4,8]>")
    graph = parse(text)
    fused = copy_graph(graph)
    FuseAttention().run(fused, Context(ledger=Ledger(stop_after=1)))
    assert Counter(n.op for n in fused.nodes)["Transpose"] == 4
    check_same(graph, fused, feeds(graph))
    FuseAttention().run(fused, Context())
    assert [n.op for n in fused.nodes] == ["Attention"]
    check_same(graph, fused, feeds(graph))


def test_fires_inside_a_subgraph(parse: Any) -> None:
    graph = parse(
        f"(bool c, {QKV}) => (float[B,4,S,8] y) {{"
        "y = If (c) <then_branch = t () => (float[B,4,S,8] ty) {"
        " kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) w = Softmax<axis=-1>(s) ty = MatMul(w, v) },"
        " else_branch = f () => (float[B,4,S,8] fy) { fy = Identity(q) }> }"
    )
    fused = copy_graph(graph)
    FuseAttention().run(fused, Context())
    assert [n.op for n in fused.nodes[0].attrs["then_branch"].nodes] == ["Attention"]
    check_same(graph, fused, feeds(graph) | {"c": np.array(True)})


def test_raises_an_old_opset(parse: Any) -> None:
    graph = parse(FIRES["product of scores"][0], opset=13)
    fused = copy_graph(graph)
    FuseAttention().run(fused, Context())
    EliminateDead().run(fused, Context())
    assert fused.opset == 23
    assert [n.op for n in fused.nodes] == ["Attention"]
    check_same(graph, fused, feeds(graph))
