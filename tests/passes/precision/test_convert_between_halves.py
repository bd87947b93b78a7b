"""convert-bf16 of float16 graphs and convert-fp16 of bfloat16 ones: the same recipe words, whatever the graph was."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.graph import (
    Array,
    Constant,
    Elementwise,
    Graph,
    constants,
    copy_graph,
    load_values,
    numpy_dtype,
    onnx_dtype,
    scopes,
)
from llmc.passes.precision.convert_bf16 import ConvertBf16
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.precision.convert_half import ConvertHalf
from llmc.passes.precision.half import BFLOAT16, FLOAT16, KEPT_FROM, as_half

FLOAT = onnx.TensorProto.FLOAT
BF16, FP16 = BFLOAT16.dtype, FLOAT16.dtype
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11}
"""Largest relative error of one rounding."""

MLP = (
    "(T[N,4] x) => (T[N,2] y) <T[4,4] w = {1,2,-1,1, 0,1,1,-2, 3,1,0,1, -1,1,2,1}, T[4] b = {1,2,3,4},"
    " T[4,2] v = {1,0,0,1,-1,2,1,1}> { h = MatMul(x, w) a = Add(h, b) r = Relu(a) y = MatMul(r, v) }"
)
ISLAND = (
    "(T[N,4] x) => (T[N,4] y) <float e = {0.5}>"
    "{ f = Cast<to=1>(x) s = Mul(f, f) t = Add(s, e) r = Sqrt(t) h = Cast<to=HALF>(r) y = Mul(x, h) }"
)
FIRES: dict[str, tuple[str, int, set[str]]] = {
    "products and sums": (MLP, 2, {"MatMul", "Add", "Relu"}),
    "a float32 island, which becomes as the rest": (ISLAND, 2, {"Mul", "Add", "Sqrt"}),
    "a cast from integers": ("(int64[N,4] x) => (T[N,4] y) { f = Cast<to=HALF>(x) y = Neg(f) }", 2, {"Neg"}),
    "a tensor filled with 2, whose bits are 16384 in either type": (
        "(T[N,4] x) => (T[N,4] y) { s = Shape(x) c = ConstantOfShape<value = T[1] {16384}>(s) y = Add(x, c) }",
        2,
        {"ConstantOfShape", "Add"},
    ),
    "a result that is an output and is read": (
        "(T[N,4] x) => (T[N,4] y, T[N,4] z) { y = Neg(x) z = Tanh(y) }",
        3,
        {"Neg", "Tanh"},
    ),
}
LEAVES_ALONE: dict[str, tuple[str, str]] = {
    "counting": ("(T[N,4] x) => (T[N,4] y) <int64 i = {1}> { y = CumSum(x, i) }", "it counts along a whole axis"),
    "angles": ("(T[N,4] x) => (T[N,4] y) { a = Exp(x) y = Sin(a) }", "needs its angle exactly"),
    "inside a subgraph": (
        "(bool q, T[N,4] x) => (T[N,4] y) { y = If(q) <"
        "then_branch = t () => (T[N,4] a) { a = Neg(x) }, else_branch = e () => (T[N,4] b) { b = Tanh(x) }> }",
        "it is inside a subgraph",
    ),
}
WAYS = [(FP16, ConvertBf16), (BF16, ConvertFp16)]
NAMES = {FP16: "float16", BF16: "bfloat16"}


def in_type(text: str, dtype: int, parse: Any) -> Graph:
    """The graph with this type for every T."""
    constant = r"\bT((?:\[[\d,]+\])?) (\w+) ="  # the parser takes numbers of 16 bits for their bits
    names = {name for _, name in re.findall(constant, text)}
    text = re.sub(r"\bT\b", NAMES[dtype], re.sub(constant, r"float\1 \2 =", text)).replace("HALF", str(dtype))
    graph: Graph = parse(text, opset=22)
    for tensor in constants(graph):
        if tensor.name in names:
            tensor.values = load_values(tensor).astype(numpy_dtype(dtype))
    return graph


def feeds_of(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    feeds = {t.name: rng.uniform(0.5, 2, [n if isinstance(n, int) else 3 for n in t.shape]) for t in graph.inputs}
    return {t.name: np.asarray(feeds[t.name]).astype(t.dtype) for t in graph.inputs}


def kinds(graph: Graph) -> set[int]:
    tensors = {onnx_dtype(t) for scope in scopes(graph) for n in scope.nodes for t in (*n.inputs, *n.outputs)}
    return tensors & {FLOAT, BF16, FP16}


@pytest.mark.parametrize(("source", "kind"), WAYS)
@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, source: int, kind: type[ConvertHalf], parse: Any, convert: Any) -> None:
    text, casts, operators = FIRES[name]
    graph = in_type(text, source, parse)
    feeds = feeds_of(graph)
    truth = Session(copy_graph(graph)).run(feeds)
    types = [(t.name, onnx_dtype(t)) for t in (*graph.inputs, *graph.outputs)]
    result = convert(graph, feeds, kind=kind)
    assert kinds(graph) <= {source, kind.half.dtype}
    changed = {n.op for n in graph.nodes if any(onnx_dtype(t) == kind.half.dtype for t in n.outputs)}
    assert changed - {"Cast"} == operators
    assert not result.kept
    assert sum(node.op == "Cast" for node in graph.nodes) == casts
    assert [(t.name, onnx_dtype(t)) for t in (*graph.inputs, *graph.outputs)] == types
    assert set(result.asked.values()) <= {kind.half.name}
    for output, expected in truth.items():
        # five operations round, in both types, and sums of four terms may cancel to a quarter of their largest
        bound = 4 * 5 * (ROUNDING[BF16] + ROUNDING[FP16]) * max(float(np.abs(expected.astype(np.float32)).max()), 1)
        found = Session(graph).run(feeds)[output]
        np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=0, atol=bound)


@pytest.mark.parametrize(("source", "kind"), WAYS)
@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, source: int, kind: type[ConvertHalf], parse: Any, convert: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = in_type(text, source, parse)
    result = convert(graph, kind=kind)
    assert kinds(graph) == {source}
    assert any(reason in said for said in result.kept.values()), result.kept


@pytest.mark.parametrize(("source", "kind"), WAYS)
def test_skips_what_has_the_type_already(source: int, kind: type[ConvertHalf], parse: Any, convert: Any) -> None:
    graph = in_type(MLP, kind.half.dtype, parse)
    with pytest.raises(Exception, match=f"nothing in the graph is {NAMES[source]}" if source == BF16 else "float32"):
        convert(graph, kind=kind)


@pytest.mark.parametrize(("source", "kind"), WAYS)
def test_inputs_and_outputs_convert_where_asked(source: int, kind: type[ConvertHalf], parse: Any, convert: Any) -> None:
    graph = in_type(MLP, source, parse)
    convert(graph, feeds_of(graph), kind=kind, inputs_outputs="convert")
    assert kinds(graph) == {kind.half.dtype}
    assert not any(node.op == "Cast" for node in graph.nodes)


def with_constants(graph: Graph, **values: Any) -> Graph:
    """The graph with these values, in bfloat16, for inputs of it."""
    for node in graph.nodes:
        for index, tensor in enumerate(node.inputs):
            if tensor.name in values:
                node.inputs[index] = Constant(tensor.name, np.array(values[tensor.name]).astype(ml_dtypes.bfloat16))
    graph.inputs = [tensor for tensor in graph.inputs if tensor.name not in values]
    return graph


def test_weights_that_float16_cannot_hold_stay_bfloat16(parse: Any, convert: Any) -> None:
    text = "(T[N,2] x, T[2,2] w, T[2,2] v) => (T[N,2] y) { a = MatMul(x, w) b = Tanh(a) y = MatMul(b, v) }"
    graph = with_constants(in_type(text, BF16, parse), w=[[1e30, 1], [1, 1]], v=[[2, 1], [1, 3]])
    result = convert(graph, kind=ConvertFp16)
    assert result.kept == {"a": "its constant 'w' reaches 1e+30, float16 ends at 65504"}
    assert {c.name: c.dtype.name for c in constants(graph)} == {"w": "bfloat16", "v": "float16"}


def test_activations_that_float16_cannot_hold_stay_bfloat16(parse: Any, convert: Any) -> None:
    graph = in_type("(T[N,4] x) => (T[N,4] y) { a = Exp(x) b = Log(a) y = Tanh(b) }", BF16, parse)
    feeds = {"x": np.full((1, 4), 20, ml_dtypes.bfloat16)}
    result = convert(graph, feeds, kind=ConvertFp16)
    assert set(result.kept) == {"a", "b"}
    assert result.kept["a"].startswith("'a' reaches 4.844e+08 on the data, over 16376 = 65504 / margin")
    assert set(result.asked) == {"y"}


def test_what_stands_for_minus_infinity_in_bfloat16_stays_finite_in_float16(parse: Any, convert: Any) -> None:
    """bfloat16's lowest number would be minus infinity, and a row of it NaN."""
    text = "(T[N,4] s, bool[N,4] m, T z, T c) => (T[N,4] y) { f = Where(m, z, c) a = Add(s, f) y = Softmax(a) }"
    lowest = ml_dtypes.finfo(ml_dtypes.bfloat16).min
    graph = with_constants(in_type(text, BF16, parse), z=0, c=lowest)
    feeds = {"s": np.ones((2, 4), ml_dtypes.bfloat16), "m": np.array([[True, True, False, False], [False] * 4])}
    result = convert(graph, feeds, kind=ConvertFp16)
    assert any("in 'c' becomes -16376" in rewrite.detail for rewrite in result.rewrites)
    np.testing.assert_array_equal(Session(graph).run(feeds)["y"], [[0.5, 0.5, 0, 0], [0.25] * 4])


def test_large_weights_are_cast_block_by_block(parse: Any) -> None:
    side = 1 + int(np.sqrt(KEPT_FROM / 2))
    weight = np.random.default_rng(0).standard_normal((side, side)).astype(np.float16)
    graph = parse(f"(float16[N,{side}] x) => (float16[N,{side}] y) <float16[1,1] w = {{0}}> {{ y = MatMul(x, w) }}")
    graph.nodes[0].inputs[1] = Constant("w", weight)
    ConvertBf16().run(graph, Context())
    (constant,) = constants(graph)
    assert isinstance(constant._values, Elementwise)
    np.testing.assert_array_equal(load_values(constant), weight.astype(np.float32).astype(ml_dtypes.bfloat16))


@settings(max_examples=200, deadline=None)
@given(bits=st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=64), way=st.booleans(), masks=st.booleans())
def test_any_value_is_cast_as_it_is_rounded(bits: list[int], way: bool, masks: bool) -> None:
    """Every bit pattern: once rounded, infinities and NaN kept, what is beyond the type brought to its end."""
    source, half = (np.float16, BFLOAT16) if way else (ml_dtypes.bfloat16, FLOAT16)
    values = np.array(bits, np.uint16).view(source)
    floor = half.fill if masks else -half.largest
    found = load_values(as_half(Constant("c", values), "c", half, floor))
    with np.errstate(invalid="ignore"):  # of NaN
        wide = values.astype(np.float64)
        inside = np.where(np.isinf(wide), wide, np.clip(wide, floor, half.largest))
        expected = inside.astype(np.float32).astype(half.numpy)  # 11 bits or fewer: exact until the last step
        np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))
    assert not np.isinf(found.astype(np.float64)[np.isfinite(wide)]).any()


OPERATORS = ["MatMul", "Where", "Tanh", "Transpose", "Identity", "Sin", "Add", "Max", "Sub"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.tuples(st.sampled_from(OPERATORS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
    borders=st.tuples(st.booleans(), st.booleans()),
    keep=st.sets(st.sampled_from(OPERATORS), max_size=2),
    stop=st.none() | st.integers(0, 8),
    way=st.booleans(),
)
def test_any_graph_from_one_to_the_other(
    steps: list[tuple[str, int, int]],
    borders: tuple[bool, bool],
    keep: set[str],
    stop: int | None,
    way: bool,
    parse: Any,
    convert: Any,
) -> None:
    """A float32 graph in one type, in part with `keep`, then in the other: valid, and close to what it was."""
    names, lines = ["x", "z"], []
    for number, (op, first, second) in enumerate(steps):
        a, b = names[first % len(names)], names[second % len(names)]
        inputs = {"MatMul": f"{a}, w", "Where": f"c, {a}, {b}", "Add": f"{a}, {b}", "Max": f"{a}, {b}"}
        lines.append(f"t{number} = {op}({inputs.get(op) or (f'{a}, {b}' if op == 'Sub' else a)})")
        names.append(f"t{number}")
    weight = ", ".join(str(float(i in (3, 6, 9, 12)) / 2) for i in range(16))
    text = (
        f"(float[4,4] x, float[4,4] z, bool[4,4] c) => (float[4,4] {names[-1]}) <float[4,4] w = {{{weight}}}>"
        f"{{ {' '.join(lines)} }}"
    )
    graph = parse(text, opset=22)
    rng = np.random.default_rng(0)
    feeds = {name: rng.uniform(-1, 1, (4, 4)).astype(np.float32) for name in "xz"} | {"c": np.tri(4, dtype=bool)}
    (truth,) = Session(graph).run(feeds).values()
    present = {node.op for node in graph.nodes}
    for border, kind, last in zip(borders, (ConvertFp16, ConvertBf16)[:: 1 if way else -1], (None, stop), strict=True):
        given_feeds = {t.name: feeds[t.name].astype(t.dtype) for t in graph.inputs}
        names_before = [t.name for t in graph.outputs]
        result = convert(
            graph, given_feeds, last, kind=kind, keep=sorted(keep & present), inputs_outputs=("keep", "convert")[border]
        )
        assert not set(result.asked) & set(result.kept)
        assert [t.name for t in graph.outputs] == names_before
    (found,) = Session(graph).run({t.name: feeds[t.name].astype(t.dtype) for t in graph.inputs}).values()
    # Eight steps, each of which rounds twice at most and doubles what came before; values up to 2^8.
    bound = 2 * 8 * (ROUNDING[BF16] + ROUNDING[FP16]) * max(1.0, float(np.abs(truth).max())) * 2
    np.testing.assert_allclose(found.astype(np.float32), truth, rtol=0, atol=bound)
