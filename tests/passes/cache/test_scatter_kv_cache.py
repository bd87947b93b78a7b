from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest

from llmc.compiler.errors import LlmcError
from llmc.compiler.session import Session
from llmc.compiler.targets import BuildRequest, Range
from llmc.compiler.targets.tensorrt import TensorRT
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.base import Context, Ledger
from llmc.passes.cache.scatter_kv_cache import ScatterKvCache
from llmc.passes.cache.static_cache import StaticCache
from llmc.passes.graph import Array, Graph, copy_graph, infer_shapes, save_model, to_model

LENGTH, BATCH = 7, 2
TYPES = {"pk": np.float32, "pv": np.float32}
TOLERANCE = 1e-5
"""float32: sums of a few products of order 1, 2^-24 each, with zeros between them, seen through a Softmax."""

INPUTS = "float[B,S,8] x, float[B,2,P,4] pk, float[B,2,P,4] pv"
MASKED = f"{INPUTS}, int64[B,P + S] attention_mask"
UNNAMED = f"{INPUTS}, int64[B,T] attention_mask"
OUTPUTS = "float[B,S,8] y, float[B,2,N,4] k, float[B,2,N,4] v"
NEW = """
h = Constant<value_ints = [0, 0, 2, 4]>()
xr = Reshape(x, h)
new = Transpose<perm = [0, 2, 1, 3]>(xr)
newv = Neg(new)
"""
CACHES = "k = Concat<axis = 2>(pk, new) v = Concat<axis = -2>(pv, newv)"
SCORES = "kt = Transpose<perm = [0, 1, 3, 2]>(k) qk = MatMul(new, kt)"
MERGE = "at = Transpose<perm = [0, 2, 1, 3]>(a) f = Constant<value_ints = [0, 0, 8]>() y = Reshape(at, f)"
ATTEND = f"a = Attention(new, k, v, mask) {MERGE}"
COUNTS = """
zero = Constant<value_int = 0>() one = Constant<value_int = 1>()
sx = Shape<start = 1, end = 2>(x) s = Squeeze(sx)
sp = Shape<start = 2, end = 3>(pk) p = Squeeze(sp)
total = Add(p, s)
"""
ROWS = "i = Range(zero, s, one) place = Add(i, p) ends = Constant<value_ints = [-1, 1]>() rows = Reshape(place, ends)"
KEYS = "columns = Range(zero, total, one)"
PADDING = "bits = Cast<to = 9>(attention_mask) axes = Constant<value_ints = [1, 2]>() pad = Unsqueeze(bits, axes)"
SCALE = "low = Constant<value_float = -10000.0>() unit = Constant<value_float = 1.0>()"
WHOLE = "whole = Expand(pad, full)"
FULL = """
bx = Shape<start = 0, end = 1>(x) t1 = Unsqueeze(total, zero) one1 = Constant<value_ints = [1]>()
full = Concat<axis = 0>(bx, one1, sx, t1)
"""

FIRES = {
    "causal by positions": (INPUTS, f"{COUNTS} {ROWS} {KEYS} mask = LessOrEqual(columns, rows) {CACHES} {ATTEND}"),
    "causal, positions from a range that begins at the past": (
        INPUTS,
        f"{COUNTS} place = Range(p, total, one) ends = Constant<value_ints = [-1, 1]>() rows = Reshape(place, ends)"
        f"{KEYS} mask = LessOrEqual(columns, rows) {CACHES} {ATTEND}",
    ),
    "a window that slides": (
        INPUTS,
        f"{COUNTS} {ROWS} {KEYS} causal = LessOrEqual(columns, rows) width = Constant<value_int = 3>() "
        f"least = Sub(rows, width) near = Greater(columns, least) mask = And(causal, near) {CACHES} {ATTEND}",
    ),
    "padding, expanded over the rows": (
        MASKED,
        f"{COUNTS} {FULL} {PADDING} {WHOLE} mask = Identity(whole) {CACHES} {ATTEND}",
    ),
    "padding and causal, of an input whose length has a name of its own": (
        UNNAMED,
        f"{COUNTS} {ROWS} {KEYS} {PADDING} causal = LessOrEqual(columns, rows) mask = And(causal, pad) "
        f"{CACHES} {ATTEND}",
    ),
    "padding, added": (
        MASKED,
        f"{COUNTS} {FULL} {SCALE} axes = Constant<value_ints = [1, 2]>() m = Unsqueeze(attention_mask, axes) "
        f"mf = Cast<to = 1>(m) inverted = Sub(unit, mf) bias = Mul(inverted, low) mask = Expand(bias, full) "
        f"{CACHES} {ATTEND}",
    ),
    "no mask: every new token sees all": (INPUTS, f"{CACHES} a = Attention(new, k, v) {MERGE}"),
    "causal by a triangle": (
        INPUTS,
        f"{COUNTS} t1 = Unsqueeze(total, zero) sq = Concat<axis = 0>(sx, t1) "
        "ones = ConstantOfShape<value = int64[1] {1}>(sq) off = Add(p, zero) low = Trilu<upper = 0>(ones, off) "
        f"mask = Cast<to = 9>(low) {CACHES} {ATTEND}",
    ),
    "distances to the token, as ALiBi has them": (
        INPUTS,
        f"{COUNTS} {ROWS} {KEYS} d = Sub(columns, rows) df = Cast<to = 1>(d) mask = Identity(df) {CACHES} {ATTEND}",
    ),
    "a table that is read at places in the cache": (
        INPUTS,
        f"{COUNTS} {ROWS} {KEYS} table = Constant<value_floats = [0.1, 1.0, 0.2, 3.0, 0.4, 0.5, 6.0]>() "
        f"r = Cast<to = 1>(rows) bias = Gather(table, columns) mask = Add(bias, r) {CACHES} {ATTEND}",
    ),
    "a table that ends before the places where no token is": (
        INPUTS,
        f"{COUNTS} {ROWS} {KEYS} d = Sub(rows, columns) n = Add(d, s) ahead = Min(n, one) "
        "nine = Constant<value_int = 9>() far = Mul(ahead, nine) off = Sub(far, nine) "
        "table = Constant<value_floats = [0.5, 0.25]>() "
        f"mask = Gather(table, off) {CACHES} {ATTEND}",
    ),
    "the number of tokens as a float": (
        INPUTS,
        f"{COUNTS} {ROWS} {KEYS} c = Cast<to = 1>(columns) tf = Cast<to = 1>(total) e = Div(c, tf) "
        f"r = Cast<to = 1>(rows) mask = Sub(e, r) {CACHES} {ATTEND}",
    ),
    "positions from a running sum of the mask": (
        MASKED,
        f"{COUNTS} {FULL} sum = CumSum(attention_mask, one) axes = Constant<value_ints = [1, 2]>() "
        f"su = Unsqueeze(sum, axes) sf = Cast<to = 1>(su) mask = Expand(sf, full) {CACHES} {ATTEND}",
    ),
    "a cache inside of the operator": (
        INPUTS,
        f"a, k, v = Attention<is_causal = 1>(new, new, newv, , pk, pv) {MERGE}",
    ),
    "a cache inside of the operator, with a mask": (
        MASKED,
        f"{COUNTS} {FULL} {PADDING} {WHOLE} a, k, v = Attention(new, new, newv, whole, pk, pv) {MERGE}",
    ),
    "attention is spelled out": (INPUTS, f"{CACHES} {SCORES} w = Softmax(qk) a = MatMul(w, v) {MERGE}"),
    "attention is spelled out, with a soft cap and padding": (
        MASKED,
        f"{COUNTS} {SCALE} {CACHES} {SCORES} axes = Constant<value_ints = [1, 2]>() "
        "m = Unsqueeze(attention_mask, axes) "
        "mf = Cast<to = 1>(m) inverted = Sub(unit, mf) bias = Mul(inverted, low) capped = Tanh(qk) "
        f"sc = Add(capped, bias) wf = Softmax<axis = 3>(sc) w = Cast<to = 1>(wf) a = MatMul(w, v) {MERGE}",
    ),
    "attention is spelled out, with sinks": (
        INPUTS,
        f"{COUNTS} {CACHES} {SCORES} bx = Shape<start = 0, end = 1>(x) two = Constant<value_ints = [2]>() "
        "one1 = Constant<value_ints = [1]>() column = Concat<axis = 0>(bx, two, sx, one1) "
        "sink = ConstantOfShape<value = float[1] {1.5}>(column) joined = Concat<axis = -1>(qk, sink) "
        "last = Constant<value_ints = [-1]>() most = ReduceMax(joined, last) less = Sub(joined, most) "
        "all = Softmax(less) first = Constant<value_ints = [0]>() w = Slice(all, first, last, last) "
        f"a = MatMul(w, v) {MERGE}",
    ),
}  # fmt: skip
LEAVES_ALONE = {
    "causal from the first token of the cache on": (
        INPUTS, OUTPUTS, f"{CACHES} [att] a = Attention<is_causal = 1>(new, k, v) {MERGE}",
        "Attention 'att' is causal from the first token of the cache on",
    ),
    "something else reads along the cache": (
        INPUTS, f"{OUTPUTS}, float[B,2,1,4] m",
        f"{CACHES} a = Attention(new, k, v) {MERGE} ax = Constant<value_ints = [2]>() [mean] m = ReduceMean(k, ax)",
        "ReduceMean 'mean' computes along the cache",
    ),
    "something else reads the cache as it was": (
        INPUTS, f"{OUTPUTS}, float[B,2,P,4] m", f"{CACHES} a = Attention(new, k, v) {MERGE} [neg] m = Neg(pk)",
        "the cache 'pk' goes to Neg 'neg', too",
    ),
    "another output is as long as the cache": (
        MASKED, f"{OUTPUTS}, bool[B,T] m",
        f"{CACHES} a = Attention(new, k, v) {MERGE} m = Cast<to = 9>(attention_mask)",
        "the output 'm' depends on how full the cache is",
    ),
    "the number of tokens is an output": (
        INPUTS, f"{OUTPUTS}, int64[1] n", f"{CACHES} a = Attention(new, k, v) {MERGE} n = Shape<start = 2, end = 3>(k)",
        "the output 'n' depends on how full the cache is",
    ),
    "a sum over the cache whose weights are no Softmax's": (
        INPUTS, OUTPUTS, f"{CACHES} {SCORES} w = Tanh(qk) [sum] a = MatMul(w, v) {MERGE}",
        "MatMul 'sum' computes along the cache",
    ),
    "weights that are changed after the Softmax": (
        INPUTS, OUTPUTS,
        f"{CACHES} {SCORES} {SCALE} s1 = Softmax(qk) w = Add(s1, unit) [sum] a = MatMul(w, v) {MERGE}",
        "MatMul 'sum' computes along the cache",
    ),
    "a Softmax along another axis": (
        INPUTS, OUTPUTS, f"{CACHES} {SCORES} [soft] w = Softmax<axis = 2>(qk) [sum] a = MatMul(w, v) {MERGE}",
        "Softmax 'soft' computes along the cache",
    ),
    "weights of sinks that are kept": (
        INPUTS, OUTPUTS,
        f"{COUNTS} {CACHES} {SCORES} bx = Shape<start = 0, end = 1>(x) two = Constant<value_ints = [2]>() "
        "one1 = Constant<value_ints = [1]>() column = Concat<axis = 0>(bx, two, sx, one1) "
        "sink = ConstantOfShape<value = float[1] {1.5}>(column) joined = Concat<axis = -1>(qk, sink) "
        "all = Softmax(joined) last = Constant<value_ints = [-1]>() first = Constant<value_ints = [1]>() "
        "end = Constant<value_ints = [1000]>() [cut] w = Slice(all, first, end, last) "
        f"a = MatMul(w, v) {MERGE}",
        "Slice 'cut' computes along the cache",
    ),
    "caches that grow by different numbers": (
        f"{INPUTS}, float[B,2,R,4] other", OUTPUTS,
        f"[k] k = Concat<axis = 2>(pk, new) [v] v = Concat<axis = 2>(pv, other) a = Attention(new, k, k) {MERGE}",
        "'pv' does not grow as the others do",
    ),
    "the mask is joined from two": (
        f"{INPUTS}, bool[B,1,S,P] before, bool[B,1,S,S] now", OUTPUTS,
        f"[join] mask = Concat<axis = 3>(before, now) {CACHES} {ATTEND}",
        "the input 'before' [B, 1, S, P] is as long as the cache, too",
    ),
    "a cache of fixed length": (
        INPUTS.replace("P", "3"), OUTPUTS, f"{CACHES} a = Attention(new, k, v) {MERGE}",
        "'pk' has room for 3 tokens already",
    ),
    "the name of the new input is taken": (
        f"{INPUTS}, int64 past_length", OUTPUTS, f"{CACHES} a = Attention(new, k, v) {MERGE}",
        "the graph has an input 'past_length' already",
    ),
    "a table that is read at places in the cache that stand in a column": (
        INPUTS, OUTPUTS,
        f"{COUNTS} {KEYS} table = Constant<value_floats = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]>() "
        "ax = Constant<value_ints = [1]>() column = Unsqueeze(columns, ax) "
        f"[look] row = Gather(table, column) mask = Transpose(row) {CACHES} a = Attention(new, k, v, mask) {MERGE}",
        "Gather 'look' computes along the cache",
    ),
}  # fmt: skip


def build(parse: Any, inputs: str, body: str, outputs: str = OUTPUTS) -> Graph:
    graph: Graph = parse(f"({quoted(inputs)}) => ({outputs}) {{ {NEW} {body} }}", opset=24)
    for tensor in graph.inputs:
        tensor.shape = ["P + S" if size == "PS" else size for size in tensor.shape]
    infer_shapes(graph)
    return graph


def quoted(inputs: str) -> str:
    """ONNX text has no dimension called `P + S`."""
    return inputs.replace("P + S", "PS")


def feeds(graph: Graph, past: int, new: int, rng: np.random.Generator) -> dict[str, Array]:
    """Random inputs but for the caches; of the second row the first tokens are padding."""
    sizes = {"B": BATCH, "S": new, "P": past, "P + S": past + new, "T": past + new}
    given: dict[str, Array] = {}
    for tensor in graph.inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        if tensor.name == "attention_mask":
            given[tensor.name] = np.ones(shape, np.int64)
            given[tensor.name][1, : min(2, past + new - 1)] = 0
        else:
            given[tensor.name] = rng.standard_normal(shape).astype(np.float32)
    return given


def static(graph: Graph, **settings: Any) -> Graph:
    changed = copy_graph(graph)
    result = ScatterKvCache(**{"length": LENGTH, **settings}).run(changed, Context())
    assert [r.detail for r in result.rewrites] == [f"2 caches of {LENGTH} tokens"], result.near_misses
    infer_shapes(changed)
    onnx.checker.check_model(to_model(changed), full_check=True)
    return changed


def same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("case", FIRES)
def test_every_fill_level_gives_what_the_growing_cache_gives(parse: Any, case: str) -> None:
    graph = build(parse, *FIRES[case])
    changed = static(graph)
    assert [n.op for n in changed.nodes].count("TensorScatter") == 2
    assert all(isinstance(size, int) for t in changed.inputs if t.name in ("pk", "pv") for size in t.shape[2:])
    growing, scattered, cache = Session(graph), Session(changed), StaticCache.of(changed)
    assert cache is not None
    rng = np.random.default_rng(0)
    for past in range(LENGTH):
        for new in range(1, LENGTH - past + 1):
            given = feeds(graph, past, new, rng)
            expected = growing.run(given)
            same(scattered.run(given), expected)
            fed = cache.feeds(given, TYPES)
            for name in cache.caches:  # what stands behind the tokens must not matter
                fed[name][:, :, past:] = 9 * rng.standard_normal(fed[name][:, :, past:].shape)
            same(cache.outputs(given, scattered.run(fed)), expected)


def test_a_loop_that_hands_the_caches_on_generates_the_same(parse: Any) -> None:
    graph = build(parse, *FIRES["padding and causal, of an input whose length has a name of its own"])
    changed = static(graph)
    growing, scattered, rng = Session(graph), Session(changed), np.random.default_rng(1)
    held = {name: rng.standard_normal((BATCH, 2, LENGTH, 4)).astype(np.float32) for name in ("pk", "pv")}
    grown = {name: np.zeros((BATCH, 2, 0, 4), np.float32) for name in ("pk", "pv")}
    past = 0
    for new in (3, 1, 2, 1):  # a prompt, then tokens
        given = feeds(graph, past, new, rng)
        expected = growing.run({**given, **grown})
        whole = np.pad(given["attention_mask"], ((0, 0), (0, LENGTH - past - new)))
        found = scattered.run({"x": given["x"], "attention_mask": whole, **held, "past_length": np.array(past)})
        np.testing.assert_allclose(found["y"], expected["y"], rtol=0, atol=TOLERANCE)
        past += new
        grown = {"pk": expected["k"], "pv": expected["v"]}
        held = {"pk": found["k"], "pv": found["v"]}
        for name, value in grown.items():
            np.testing.assert_array_equal(held[name][:, :, :past], value)


def test_the_reference_evaluator_agrees(parse: Any) -> None:
    graph = build(parse, *FIRES["padding, added"])
    changed = static(graph)
    given = feeds(graph, 3, 2, np.random.default_rng(2))
    cache = StaticCache.of(changed)
    assert cache is not None
    evaluator = onnx.reference.ReferenceEvaluator(to_model(changed))
    found = dict(zip(evaluator.output_names, evaluator.run(None, cache.feeds(given, TYPES)), strict=True))
    same(cache.outputs(given, found), Session(graph).run(given))


@pytest.mark.parametrize("case", LEAVES_ALONE)
def test_leaves_alone(parse: Any, case: str) -> None:
    inputs, outputs, body, reason = LEAVES_ALONE[case]
    graph = build(parse, inputs, body, outputs)
    before = to_model(graph)
    result = ScatterKvCache(length=LENGTH).run(graph, Context())
    assert result.rewrites == []
    assert [miss.reason for miss in result.near_misses] == [reason]
    assert to_model(graph) == before


def test_a_graph_without_a_cache_is_not_its_business(parse: Any) -> None:
    graph = parse("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    assert ScatterKvCache().run(graph, Context()).near_misses == []
    assert StaticCache.of(graph) is None


def test_the_run_can_end_before_it(parse: Any) -> None:
    graph = build(parse, *FIRES["causal by positions"])
    assert ScatterKvCache().run(graph, Context(Ledger(0))).rewrites == []
    assert "TensorScatter" not in [node.op for node in graph.nodes]


def test_more_tokens_than_the_cache_holds_are_refused(parse: Any) -> None:
    graph = build(parse, *FIRES["causal by positions"])
    session = Session(static(graph))
    with pytest.raises(LlmcError, match="8 tokens do not fit into the static cache of 7"):
        session.run(feeds(graph, LENGTH, 1, np.random.default_rng(0)))


def test_the_names_are_the_recipe_s(parse: Any) -> None:
    inputs, body = FIRES["padding, added"]
    graph = build(parse, inputs.replace("attention_mask", "seen"), body.replace("attention_mask", "seen"))
    changed = static(graph, mask="seen", past_length="filled")
    assert [t.name for t in changed.inputs] == ["x", "pk", "pv", "seen", "filled"]
    assert changed.inputs[3].shape == ["B", LENGTH]


def test_in_half_precision_the_caches_are_of_that_type(parse: Any, convert: Any, close: Any) -> None:
    graph = build(parse, *FIRES["padding, added"])
    changed, given = static(graph), feeds(graph, 3, 2, np.random.default_rng(3))
    convert(changed, given)
    halves = [t.name for t in (*changed.inputs, *changed.outputs) if t.dtype == np.float16]
    assert halves == ["pk", "pv", "k", "v"]
    # Of values below 4: the inputs are rounded, then the scores, the weights and the result.
    close(changed, given, Session(graph).run(given), roundings=8)


@pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason=availability("tensorrt-rtx").missing)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "case", ["causal, positions from a range that begins at the past", "attention is spelled out, with sinks"]
)
def test_tensorrt_builds_it(parse: Any, convert: Any, case: str, half: bool, tmp_path: Path) -> None:
    graph = static(build(parse, *FIRES[case]))
    if half:
        convert(graph)
    target, request = TensorRT("tensorrt-rtx"), BuildRequest([{"B": Range(1, 2, 4), "S": Range(1, 2, 4)}], (89,))
    assert target.check(graph, request) == []
    save_model(graph, tmp_path / "model.onnx")
    built = target.build(tmp_path / "model.onnx", tmp_path, request, lambda _: None)
    assert "past_length int64[]" in built.facts["inputs"]  # type: ignore[operator]
