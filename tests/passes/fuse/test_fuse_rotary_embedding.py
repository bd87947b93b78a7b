from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.fuse.fuse_rotary_embedding import FuseRotaryEmbedding
from llmc.passes.graph import Array, Graph, copy_graph, to_model

SIZES = {"B": 2, "S": 3}
HEAD = "(float[B,4,S,8] x, {inputs}) => ({output}) <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, "
HEAD += "int64[1] four = {{4}}, int64[1] last = {{-1}}, int64[1] end = {{9223372036854775807}}> {{{body}}}"
ANGLES = "float[1,S,4] f"
TABLES = "ff = Concat<axis=-1>(f, f) c3 = Cos(ff) s3 = Sin(ff) c = Unsqueeze(c3, one) s = Unsqueeze(s3, one) "
HALVES = "x1 = Slice(x, zero, four, last, one) x2 = Slice(x, four, end, last, one) "
TURN = "n = Neg(x2) r = Concat<axis=-1>(n, x1) a = Mul(x, c) b = Mul(r, s) "
PAIRS = "x1 = Slice(x, zero, end, last, two) x2 = Slice(x, one, end, last, two) "
CROSS = "p = Mul(x1, c) q = Mul(x2, s) re = Sub(p, q) t = Mul(s, x1) u = Mul(c, x2) im = Add(t, u) "
STACK = "whole = Constant<value_ints = [0,4,-1,8]>() "


def model(body: str, inputs: str = ANGLES, output: str = "float[B,4,S,8] y") -> str:
    return HEAD.format(body=body, inputs=inputs, output=output)


EXPAND = ["Concat", "Expand", "Shape"]
FIRES: dict[str, tuple[str, dict[str, int], list[str]]] = {
    "halves": (model(TABLES + HALVES + TURN + "y = Add(a, b)"), {}, ["Cos", "Sin", *EXPAND, *EXPAND]),
    "halves by Split": (
        model(TABLES + "x1, x2 = Split<axis=-1, num_outputs=2>(x) " + TURN + "y = Add(b, a)"),
        {},
        ["Cos", "Sin", *EXPAND, *EXPAND],
    ),
    "tables of the batch": (
        model(TABLES + HALVES + TURN + "y = Add(a, b)", "float[B,S,4] f"),
        {},
        ["Cos", "Sin"],
    ),
    "scaled tables": (
        model(
            "k = Constant<value = float {1.5}>() ff = Concat<axis=-1>(f, f) c2 = Cos(ff) s2 = Sin(ff) c3 = Mul(c2, k) "
            "s3 = Mul(k, s2) c = Unsqueeze(c3, one) s = Unsqueeze(s3, one) " + HALVES + TURN + "y = Add(a, b)",
            "float[B,S,4] f",
        ),
        {},
        ["Cos", "Mul", "Mul", "Sin"],
    ),
    "tables without a batch": (
        model(
            "c = Concat<axis=-1>(f, f) s = Concat<axis=-1>(h, h) " + HALVES + TURN + "y = Add(a, b)",
            "float[S,4] f, float[S,4] h",
        ),
        {},
        ["Unsqueeze", "Unsqueeze", *EXPAND, *EXPAND],
    ),
    "rows of constant tables": (
        model(
            "tc = Constant<value = float[3,8] {0,1,2,3,0,1,2,3, 4,5,6,7,4,5,6,7, 8,9,1,2,8,9,1,2}>() "
            "ts = Constant<value = float[3,8] {3,2,1,0,3,2,1,0, 7,6,5,4,7,6,5,4, 2,1,9,8,2,1,9,8}>() "
            "c3 = Gather(tc, i) s3 = Gather(ts, i) c = Unsqueeze(c3, one) s = Unsqueeze(s3, one) "
            + HALVES
            + TURN
            + "y = Add(a, b)",
            "int64[B,S] i",
        ),
        {},
        ["Gather", "Gather"],
    ),
    "rows of constant tables that are cut to the longest sequence": (
        model(
            "tc = Constant<value = float[1,1,4,8] {0,1,2,3,0,1,2,3,4,5,6,7,4,5,6,7,8,9,1,2,8,9,1,2,1,1,1,1,1,1,1,1}>() "
            "ts = Constant<value = float[1,1,4,8] {3,2,1,0,3,2,1,0,7,6,5,4,7,6,5,4,2,1,9,8,2,1,9,8,1,1,1,1,1,1,1,1}>() "
            "n = Shape<start=1,end=2>(i) c6 = Slice(tc, zero, n, two, one) s6 = Slice(ts, zero, n, two, one) "
            "c5 = Squeeze(c6, one) s5 = Squeeze(s6, one) c4 = Squeeze(c5, zero) s4 = Squeeze(s5, zero) "
            "c3 = Gather(c4, i) s3 = Gather(s4, i) c = Unsqueeze(c3, one) s = Unsqueeze(s3, one) "
            + HALVES
            + TURN.replace("n = Neg(x2)", "m = Neg(x2)").replace("(n, x1)", "(m, x1)")
            + "y = Add(a, b)",
            "int64[B,S] i",
        ),
        {},
        ["Gather", "Gather", "Shape", "Slice", "Slice", *["Squeeze"] * 4],
    ),
    "interleaved": (
        model(
            "f4 = Unsqueeze(f, last) pairs = Constant<value_ints = [1,1,1,2]>() f5 = Expand(f4, pairs) "
            "eight = Constant<value_ints = [0,0,8]>() ff = Reshape(f5, eight) "
            "c3 = Cos(ff) s3 = Sin(ff) c = Unsqueeze(c3, one) s = Unsqueeze(s3, one) "
            + PAIRS
            + STACK
            + "n = Neg(x2) nu = Unsqueeze(n, last) xu = Unsqueeze(x1, last) st = Concat<axis=-1>(nu, xu) "
            "r = Reshape(st, whole) a = Mul(x, c) b = Mul(r, s) y = Add(a, b)",
            "float[B,S,4] f",
        ),
        {"interleaved": 1},
        ["Cos", "Sin"],
    ),
    "difference and sum": (
        model(
            "c = Unsqueeze(f, one) s = Unsqueeze(h, one) " + HALVES + CROSS + "y = Concat<axis=-1>(re, im)",
            "float[B,S,4] f, float[B,S,4] h",
        ),
        {},
        ["Squeeze", "Squeeze", "Unsqueeze", "Unsqueeze"],
    ),
    "difference and sum, interleaved": (
        model(
            PAIRS
            + STACK
            + CROSS
            + "ru = Unsqueeze(re, last) iu = Unsqueeze(im, last) st = Concat<axis=-1>(ru, iu) y = Reshape(st, whole)",
            "float[B,1,S,4] c, float[B,1,S,4] s",
        ),
        {"interleaved": 1},
        ["Squeeze", "Squeeze"],
    ),
    "heads behind the sequence": (
        model(
            "xt = Transpose<perm=[0,2,1,3]>(x) "
            + HALVES.replace("(x", "(xt")
            + "c = Unsqueeze(f, two) s = Unsqueeze(h, two) "
            + CROSS
            + "o = Concat<axis=-1>(re, im) "
            "y = Transpose<perm=[0,2,1,3]>(o)",
            "float[B,S,4] f, float[B,S,4] h",
        ),
        {"num_heads": 4},
        ["Reshape", "Reshape", "Squeeze", "Squeeze", "Transpose", "Transpose", "Unsqueeze", "Unsqueeze"],
    ),
    "first part": (
        model(
            "ff = Concat<axis=-1>(f, f) c3 = Cos(ff) s3 = Sin(ff) c = Unsqueeze(c3, one) s = Unsqueeze(s3, one) "
            "w = Slice(x, zero, four, last, one) rest = Slice(x, four, end, last, one) "
            "x1 = Slice(w, zero, two, last, one) x2 = Slice(w, two, end, last, one) "
            + TURN.replace("(x,", "(w,")
            + "o = Add(a, b) y = Concat<axis=-1>(o, rest)",
            "float[B,S,2] f",
        ),
        {"rotary_embedding_dim": 4, "num_heads": 4},
        ["Cos", "Sin"],
    ),
}


def feeds(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    given: dict[str, Array] = {}
    for tensor in graph.inputs:
        shape = [n if isinstance(n, int) else SIZES[n] for n in tensor.shape]
        whole = tensor.dtype.kind == "i"
        given[tensor.name] = (rng.integers(0, 3, shape) if whole else rng.standard_normal(shape)).astype(tensor.dtype)
    return given


def check_same(before: Graph, after: Graph) -> None:
    onnx.checker.check_model(to_model(after), full_check=True)
    given = feeds(before)
    # float32: two products of order 10 and their sum, rounded in another order, 2^-24 each
    np.testing.assert_allclose(Session(after).run(given)["y"], Session(before).run(given)["y"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any) -> None:
    text, attributes, others = FIRES[name]
    graph = parse(text)
    fused = copy_graph(graph)
    result = FuseRotaryEmbedding().run(fused, Context())
    (rotary,) = [n for n in fused.nodes if n.op == "RotaryEmbedding"]
    assert dict(rotary.attrs) == attributes
    assert sorted(n.op for n in fused.nodes if n is not rotary) == sorted(others)
    assert [(r.number, r.rule) for r in result.rewrites] == [(1, "rotary")]
    assert result.near_misses == []
    assert fused.opset == 23
    check_same(graph, fused)


LEAVES_ALONE = {
    "halves that may differ": (
        model(
            "c = Unsqueeze(f, one) s = Unsqueeze(h, one) " + HALVES + TURN + "y = Add(a, b)",
            "float[B,S,8] f, float[B,S,8] h",
        ),
        "the halves of 'f' are not known to be equal",
    ),
    "tables that are cut along the halves": (
        model(
            "w = Concat<axis=-1>(f, f, f) c4 = Cos(w) s4 = Sin(w) eight = Add(four, four) "
            "c3 = Slice(c4, two, eight, last, one) s3 = Slice(s4, two, eight, last, one) "
            "cc = Concat<axis=-1>(c3, f) sc = Concat<axis=-1>(s3, f) c0 = Slice(cc, zero, eight, last, one) "
            "s0 = Slice(sc, zero, eight, last, one) c = Unsqueeze(c0, one) s = Unsqueeze(s0, one) "
            + HALVES
            + TURN
            + "y = Add(a, b)",
            "float[B,S,4] f",
        ),
        "'c0' comes from Slice 'c0': its halves are not known to be equal",
    ),
    "constant halves that differ": (
        model("c = Constant<value = float[8] {1,2,3,4,1,2,3,5}>() s = Identity(c) " + HALVES + TURN + "y = Add(a, b)"),
        "the halves of 'c' differ",
    ),
    "other half negated": (
        model(TABLES + HALVES.replace("x1", "x0").replace("x2", "x1").replace("x0", "x2") + TURN + "y = Add(a, b)"),
        "'x1' is not the first half of 'x'",
    ),
    "not in the middle": (
        model(TABLES + HALVES.replace("four", "two") + TURN + "y = Add(a, b)"),
        "'x' is not split into halves",
    ),
    "turned part is used twice": (
        model(TABLES + HALVES + TURN + "y = Add(a, b) z = Relu(r)", output="float[B,4,S,8] y, float[B,4,S,8] z"),
        "'r', inside the pattern, is an output of the graph or used twice",
    ),
    "no sum": (
        model(TABLES + HALVES + "n = Neg(x2) r = Concat<axis=-1>(n, x1) y = Relu(r)"),
        "the rotated halves go to Relu 'y', where the sine and a sum are needed",
    ),
    "sum of something else": (
        model(TABLES + HALVES + TURN + "o = Relu(a) y = Add(o, b)"),
        "Add 'y' adds no product of 'x' and the cosine",
    ),
    "tables of each head": (
        model(
            "c = Concat<axis=-1>(f, f) s = Concat<axis=-1>(f, f) " + HALVES + TURN + "y = Add(a, b)", "float[B,4,S,4] f"
        ),
        "the cosine 'c' is not [batch or 1, 1, sequence, size]",
    ),
    "Neg elsewhere": (model("y = Neg(x)"), "'x' is no part of another tensor"),
}


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = parse(text)
    before = [n.op for n in graph.nodes]
    result = FuseRotaryEmbedding().run(graph, Context())
    assert result.rewrites == []
    assert [n.op for n in graph.nodes] == before
    assert [miss.reason for miss in result.near_misses] == [reason]


def test_tables_are_made_once_for_all_layers(parse: Any) -> None:
    layer = (
        "{0}1 = Slice({1}, zero, four, last, one) {0}2 = Slice({1}, four, end, last, one) {0}n = Neg({0}2) "
        "{0}r = Concat<axis=-1>({0}n, {0}1) {0}a = Mul({1}, c) {0}b = Mul({0}r, s) {2} = Add({0}a, {0}b) "
    )
    graph = parse(model(TABLES + layer.format("p", "x", "m") + layer.format("q", "m", "y")))
    fused = copy_graph(graph)
    FuseRotaryEmbedding().run(fused, Context())
    counts = Counter(n.op for n in fused.nodes)
    assert counts == {"RotaryEmbedding": 2, "Cos": 1, "Sin": 1, "Expand": 2, "Shape": 2, "Concat": 2}
    check_same(graph, fused)


@pytest.mark.parametrize("positions", [False, True])
def test_gives_narrow_tables_the_batch_that_the_operator_wants(positions: bool, parse: Any) -> None:
    given = "float[3,4] c, float[3,4] s, int64[1,S] p" if positions else "float[1,S,4] c, float[1,S,4] s"
    graph = parse(model(f"y = RotaryEmbedding(x, c, s{', p' * positions})", given), opset=23)
    with pytest.raises(Exception, match="RotaryEmbedding"):
        Session(graph).run(feeds(graph))
    result = FuseRotaryEmbedding().run(graph, Context())
    assert [r.rule for r in result.rewrites] == ["rotary-batch"]
    values = feeds(graph)
    whole = Session(graph).run(values)["y"]
    for index in range(2):
        alone = Session(graph).run(values | {"x": values["x"][index : index + 1]})["y"]
        np.testing.assert_array_equal(whole[index : index + 1], alone)


def test_stops_after_the_last_allowed_rewrite(parse: Any) -> None:
    graph = parse(FIRES["halves"][0])
    before = [n.op for n in graph.nodes]
    result = FuseRotaryEmbedding().run(graph, Context(ledger=Ledger(stop_after=0)))
    assert result.rewrites == []
    assert [n.op for n in graph.nodes] == before
