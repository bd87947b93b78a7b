from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as numpy_strategies
import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.graph import Array, Constant, Derived, Graph, constants, copy_graph, from_model, scopes, to_model
from llmc.passes.simplify.fold_constants import RECOMPUTED_FROM, FoldConstants

FOLDS = {
    "a chain of constants": (
        "(float[N,2] x) => (float[N,2] y) <float[2] a = {1, 2}, float[2] b = {3, 5}>"
        "{ s = Add(a, b) t = Mul(s, b) y = Add(x, t) }",
        ["s", "t"],
    ),
    "the transpose of a weight": (
        "(float[N,3] x) => (float[N,2] y) <float[2,3] w = {1, 2, 3, 4, 5, 6}> { t = Transpose(w) y = MatMul(x, t) }",
        ["t"],
    ),
    "several results": (
        "(float[N,2] x) => (float[N,2] y) <float[4] w = {1, 2, 3, 4}>"
        "{ a, b = Split<axis=0, num_outputs=2>(w) c = Add(x, a) y = Add(c, b) }",
        ["a", "b"],
    ),
    "a shape that is known": (
        "(float[2,3] x, float[N] z) => (int64[2] y) { s = Shape(x) y = Mul(s, s) }",
        ["s"],
    ),
    "a size that is known": ("(float[2,3] x) => (int64 y) { s = Size(x) y = Mul(s, s) }", ["s"]),
    "part of a shape": ("(float[N,3,4] x) => (int64[2] y) { s = Shape<start=1>(x) y = Neg(s) }", ["s"]),
    "one dimension": (
        "(float[N,3,4] x) => (int64 y) <int64 i = {-1}> { s = Shape(x) g = Gather(s, i) y = Neg(g) }",
        ["g"],
    ),
    "dimensions through the shape arithmetic of exporters": (
        "(float[N,3,M,4] x) => (int64[2] y) <int64[1] one = {1}, int64[1] last = {9223372036854775807},"
        " int64[1] two = {2}, int64[1] i = {0}, int64 axis = {0}>"
        "{ s = Shape(x) c = Cast<to=7>(s) t = Slice(c, one, last, i, two) g = Gather(t, axis) u = Unsqueeze(g, i)"
        " d = Concat<axis=0>(u, t) e = Slice(d, i, two) y = Neg(e) }",
        ["t", "g", "u", "d", "e"],
    ),
    "dimensions that only a second look finds": (
        "(float[N,6] x) => (float[M,K] y) <int64[1] i = {1}, int64[1] m = {-1}, int64[1] two = {2}>"
        "{ s = Shape(x) g = Gather(s, i) h = Div(g, two) d = Concat<axis=0>(m, h) r = Reshape(x, d)"
        " t = Shape(r) p = Gather(t, i) q = Expand(r, p) y = Neg(q) }",
        ["g", "h", "d", "p"],
    ),
    "inside a subgraph, with a constant from outside": (
        "(bool q, float[N,2] x) => (float[N,2] y) <float[2] w = {1, 2}> { v = Neg(w) y = If(q) <"
        "then_branch = t () => (float[N,2] z) { a = Abs(v) z = Add(x, a) },"
        "else_branch = e () => (float[N,2] z2) { a2 = Exp(v) z2 = Add(x, a2) }> }",
        ["v", "a", "a2"],
    ),
    "a cast": (
        "(float[N,2] x) => (float[N,2] y) <int64[2] w = {1, -2}> { c = Cast<to=1>(w) y = Add(x, c) }",
        ["c"],
    ),
    "moved float16": (
        "(float16[N,2] x) => (float16[N,2] y) <float16[1,2] w = {1, 2}>"
        "{ t = Transpose(w) u = Transpose(t) y = Add(x, u) }",
        ["t", "u"],
    ),
}

LEAVES_ALONE = {
    "an output of the graph": (
        "(float[N] x) => (float[2] y, float[N] z) <float[2] a = {1, 2}> { y = Neg(a) z = Neg(x) }",
        "its result 'y' is an output of the graph",
    ),
    "the result of a subgraph": (
        "(bool q) => (float[2] y) <float[2] w = {1, 2}> { y = If(q) <"
        "then_branch = t () => (float[2] z) { z = Abs(w) }, else_branch = e () => (float[2] z2) { z2 = Neg(w) }> }",
        "is an output of the graph",
    ),
    "a dimension that is not known": (
        "(float[N,3] x) => (int64 y) <int64 i = {0}> { s = Shape(x) g = Gather(s, i) y = Neg(g) }",
        "",
    ),
    "random": (
        "(float[2] x) => (float[2] y) { a = RandomNormal<shape=[2]>() y = Add(x, a) }",
        "RandomNormal gives another result each time",
    ),
    "random, like a constant": (
        "(float[2] x) => (float[2] y) <float[2] w = {1, 2}> { a = RandomNormalLike(w) y = Add(x, a) }",
        "RandomNormalLike gives another result each time",
    ),
    "a quantized weight": (
        "(float[2] x) => (float[2] y) <int8[2] w = {1, 2}, float s = {0.5}>"
        "{ d = DequantizeLinear(w, s) y = Add(x, d) }",
        "its constants are stored quantized: folding it would undo that",
    ),
    "a weight to be quantized": (
        "(float[2] x) => (float[2] y) <float[2] w = {1, 2}, float s = {0.5}, int8 z = {0}>"
        "{ q = QuantizeLinear(w, s, z) d = DequantizeLinear(q, s, z) y = Add(x, d) }",
        "folding it is not asked for: set `quantize`",
    ),
    "float16 arithmetic": (
        "(float16[2] x) => (float16[2] y) <float16[2] w = {1, 2}> { a = Exp(w) y = Add(x, a) }",
        "arithmetic in float16 is left to the runtime",
    ),
    "an operator that is not trusted": (
        "(float[2] x) => (float[2] y) <float[2] w = {1, 2}> { a = Softmax(w) y = Add(x, a) }",
        "Softmax is not among the operators that are computed ahead",
    ),
    "integers divided with a negative remainder": (
        "(int64[1] x) => (int64[1] y) <int64[1] a = {-7}, int64[1] b = {2}> { d = Div(a, b) y = Add(x, d) }",
        "it divides integers with a negative remainder",
    ),
    "division by zero": (
        "(int64[1] x) => (int64[1] y) <int64[1] a = {7}, int64[1] b = {0}> { d = Mod(a, b) y = Add(x, d) }",
        "it divides by zero",
    ),
    "a cast out of range": (
        "(int32[1] x) => (int32[1] y) <float[1] a = {3e9}> { c = Cast<to=6>(a) y = Add(x, c) }",
        "its values leave the range of int32",
    ),
    "NaN": (
        "(float[1] x) => (float[1] y) <float[1] a = {-1.0}> { c = Sqrt(a) y = Add(x, c) }",
        "its result has NaN",
    ),
    "a range of rounded steps": (
        "(float[N] x) => (float[N] y) <float a = {0.0}, float b = {1.0}, float c = {0.1}>"
        "{ r = Range(a, b, c) y = Add(x, r) }",
        "its steps are rounded",
    ),
    "an index out of range": (
        "(float[1] x) => (float[1] y) <float[2] a = {1, 2}, int64[1] i = {5}> { g = Gather(a, i) y = Add(x, g) }",
        "computing it fails: ",
    ),
    "shapes that do not fit": (
        "(float[3] x) => (float[3] y) <float[2] a = {1, 2}, float[3] b = {1, 2, 3}> { g = Add(a, b) y = Add(x, g) }",
        "ONNX finds it invalid: ",
    ),
}


def tensors_made(graph: Graph) -> set[str]:
    return {t.name for scope in scopes(graph) for node in scope.nodes for t in node.outputs if t.name}


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str, parse: Any, random_feeds: Any) -> None:
    text, folded = FOLDS[name]
    graph = parse(text)
    feeds = random_feeds(graph, size=6)
    expected, before = Session(graph).run(feeds), tensors_made(graph)
    result = FoldConstants().run(graph, Context())
    assert before - tensors_made(graph) == set(folded)
    assert all("is an output of the graph" in miss.reason for miss in result.near_misses)
    onnx.checker.check_model(to_model(graph), full_check=True)
    found = Session(graph).run(feeds)
    for key, value in expected.items():
        # Folded arithmetic is float32 in NumPy and in ONNX Runtime; one rounding each, of values up to 10.
        np.testing.assert_allclose(found[key], value, rtol=2.0**-22, atol=0)
    assert FoldConstants().run(graph, Context()).rewrites == []


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = parse(text)
    before = tensors_made(graph)
    result = FoldConstants().run(graph, Context())
    assert result.rewrites == []
    assert tensors_made(graph) == before
    assert {reason in miss.reason for miss in result.near_misses} == ({True} if reason else set())


def test_quantizes_weights_where_asked(parse: Any, random_feeds: Any) -> None:
    graph = parse(LEAVES_ALONE["a weight to be quantized"][0])
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)["y"]
    FoldConstants(quantize=True).run(graph, Context())
    assert [node.op for node in graph.nodes] == ["DequantizeLinear", "Add"]
    assert graph.nodes[0].inputs[0].dtype == np.int8
    assert np.array_equal(Session(graph).run(feeds)["y"], expected)


def test_sibling_subgraphs_may_have_named_their_tensors_alike(parse: Any, random_feeds: Any) -> None:
    graph = parse(
        "(bool q, float[N,2] x) => (float[N,2] y) <float[2] w = {1, 2}> { y = If(q) <"
        "then_branch = t () => (float[N,2] z) { a = Abs(w) z = Add(x, a) },"
        "else_branch = e () => (float[N,2] z) { a = Neg(w) z = Add(x, a) }> }"
    )
    feeds = random_feeds(graph)
    both = [{**feeds, "q": np.array(choice)} for choice in (False, True)]
    expected = [Session(graph).run(f)["y"] for f in both]
    assert len(FoldConstants().run(graph, Context()).rewrites) == 2
    assert len({c.name for c in constants(graph)}) == 2
    for feeds, value in zip(both, expected, strict=True):
        assert np.array_equal(Session(graph).run(feeds)["y"], value)


def expanded(*sizes: int) -> Graph:
    """Expand of one number to each of `sizes` float32 elements, all summed up."""
    nodes, initializers = [], [onnx.numpy_helper.from_array(np.float32([1.5]), "c")]
    for size in sizes:
        initializers.append(onnx.numpy_helper.from_array(np.array([size]), f"s{size}"))
        nodes.append(onnx.helper.make_node("Expand", ["c", f"s{size}"], [f"e{size}"], name=f"expand {size}"))
        nodes.append(onnx.helper.make_node("Mul", ["x", f"e{size}"], [f"y{size}"]))
    x = onnx.helper.make_tensor_value_info("x", 1, [1])
    outputs = [onnx.helper.make_tensor_value_info(f"y{size}", 1, [size]) for size in sizes]
    model = onnx.helper.make_graph(nodes, "g", [x], outputs, initializers)
    return from_model(onnx.helper.make_model(model, opset_imports=[onnx.helper.make_opsetid("", 20)]))


def test_the_growth_limit_holds_for_all_folds_together() -> None:
    graph = expanded(1000, 1500, 250)
    result = FoldConstants(growth_limit=8000).run(graph, Context())
    assert [r.node for r in result.rewrites] == ["expand 1000", "expand 250"]
    (miss,) = result.near_misses
    assert (miss.node, miss.reason) == ("expand 1500", "folding it would add 6.0 kB, 4.0 kB of growth are left")


def test_what_a_fold_replaces_does_not_count_as_growth(parse: Any) -> None:
    """100 kB through three steps, of which only the first adds something: the others take its place."""
    graph = parse(
        "(float[1] x) => (float[25000] y) <float[1] c = {1.5}, int64[1] s = {25000}>"
        "{ e = Expand(c, s) n = Neg(e) a = Abs(n) y = Mul(x, a) }"
    )
    assert len(FoldConstants(growth_limit=100_000).run(graph, Context()).rewrites) == 3


def test_nothing_is_computed_that_is_too_large_to_keep(parse: Any) -> None:
    """4 TB: were it tried, this machine would notice."""
    graph = parse(
        "(float[1] x) => (float[N,M] y) <float[1,1] c = {1.5}, int64[2] s = {1048576, 1048576}>"
        "{ e = Expand(c, s) y = Mul(x, e) }"
    )
    (miss,) = FoldConstants().run(graph, Context()).near_misses
    assert miss.reason == "folding it would add 4398046.5 MB, 1.0 MB of growth are left"


def test_large_results_are_computed_when_read(parse: Any) -> None:
    side = 1 + int(np.sqrt(RECOMPUTED_FROM / 4))
    weight = np.random.default_rng(0).standard_normal((side, side)).astype(np.float32)
    graph = parse(
        f"(float[N,{side}] x) => (float[N,{side}] y) <float[1,1] w = {{0}}>"
        "{ t = Transpose<perm=[1,0]>(w) s = Neg(t) y = MatMul(x, s) }"
    )
    graph.nodes[0].inputs[0] = Constant("weight", weight)
    graph.nodes[0].outputs[0].shape = graph.nodes[1].outputs[0].shape = None
    FoldConstants().run(graph, Context())
    (constant,) = constants(graph)
    assert isinstance(constant._values, Derived)
    assert np.array_equal(constant._values.load(), -weight.T)
    x = np.ones((1, side), np.float32)
    # A sum of `side` terms of order 1, added up in another order: fewer than `side` roundings of 2^-24 · 40.
    np.testing.assert_allclose(Session(graph).run({"x": x})["y"], -x @ weight.T, atol=side * 40 * 2.0**-24)


@pytest.mark.parametrize("stop_after", range(7))
def test_stops_after_any_rewrite_with_the_same_results(stop_after: int, parse: Any, random_feeds: Any) -> None:
    text, folded = FOLDS["dimensions through the shape arithmetic of exporters"]
    graph = parse(text)
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)["y"]
    result = FoldConstants().run(graph, Context(Ledger(stop_after)))
    assert len(result.rewrites) == min(stop_after, len(folded))
    assert np.array_equal(Session(graph).run(feeds)["y"], expected)


# Against ONNX Runtime, operator by operator, on values and shapes that nobody chose

VALUES = {
    "float32": st.floats(-100, 100, width=32),
    "int64": st.integers(-(2**30), 2**30),  # from 2^31 on ONNX Runtime 1.31 gets Max of int64 wrong
    "int32": st.integers(-(2**15), 2**15),
}
FUNCTIONS = ("Cos", "Exp", "Log", "Reciprocal", "Sigmoid", "Sin", "Sqrt", "Tanh")
SUMS = ("CumSum", "MatMul", "ReduceMean", "ReduceProd", "ReduceSum")
REFUSED = (
    "it divides integers with a negative remainder",
    "it divides by zero",
    "runtimes differ on slices backwards from or to outside of an axis",
    "its product may overflow",
    "its result has NaN",
)


@st.composite
def one_node(draw: Any) -> tuple[onnx.NodeProto, list[Array], int]:
    """A node, its inputs, and the opset that it is of."""
    opset = draw(st.sampled_from([13, 17, 21]))
    dtype = draw(st.sampled_from(sorted(VALUES)))
    shape = draw(numpy_strategies.array_shapes(min_dims=1, max_dims=3, max_side=4))
    data = draw(numpy_strategies.arrays(dtype, shape, elements=VALUES[dtype]))
    row = draw(numpy_strategies.arrays(dtype, shape[-1:], elements=VALUES[dtype]))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    within = st.integers(-shape[axis], shape[axis] - 1)
    bound = st.integers(-6, 6) | st.sampled_from([2**63 - 1, -(2**63) + 1])
    flag = st.integers(0, 1)

    def integers(*values: Any) -> list[Array]:
        return [np.atleast_1d(np.array(value, dtype=np.int64)) for value in values]

    def reduction(op: str) -> tuple[list[Array], dict[str, Any]]:
        keep = {"keepdims": draw(flag)}
        by_input = opset >= 18 or op == "ReduceSum"
        return ([data, *integers([axis])], keep) if by_input else ([data], {**keep, "axes": [axis]})

    choices: dict[str, Callable[[str], tuple[list[Array], dict[str, Any]]]] = {
        "Slice": lambda _: (
            [data, *integers(draw(bound), draw(bound), axis, draw(st.sampled_from([1, 2, -1, -2])))],
            {},
        ),
        "Gather": lambda _: ([data, *integers(draw(st.lists(within, max_size=3)))], {"axis": axis}),
        "GatherElements": lambda _: (
            [data, draw(numpy_strategies.arrays("int64", shape, elements=within))],
            {"axis": axis},
        ),
        "ScatterElements": lambda _: (
            [data, np.full_like(data.take([0], axis), draw(within), dtype=np.int64), -data.take([0], axis)],
            {"axis": axis},
        ),
        "Reshape": lambda _: ([data, *integers(draw(st.sampled_from([[-1], [0, -1], [-1, 1], list(shape)])))], {}),
        "Transpose": lambda _: ([data], {"perm": draw(st.permutations(range(len(shape))))}),
        "Concat": lambda _: ([data, data], {"axis": axis}),
        "Tile": lambda _: ([data, *integers([draw(st.integers(0, 2)) for _ in shape])], {}),
        "Pad": lambda _: ([data, *integers([draw(st.integers(0, 2)) for _ in (*shape, *shape)])], {}),
        "Unsqueeze": lambda _: ([data, *integers([axis])], {}),
        "Squeeze": lambda _: ([data.take([0], axis), *integers([axis])], {}),
        "Expand": lambda _: ([data, *integers([2, *shape])], {}),
        "Trilu": lambda _: ([np.stack([data, data])], {"upper": draw(flag)}),
        "Where": lambda _: ([data > 0, data, row], {}),
        "CumSum": lambda _: ([data, np.array(axis)], {"exclusive": draw(flag), "reverse": draw(flag)}),
        "Clip": lambda _: ([data, np.array(-7, dtype), np.array(9, dtype)], {}),
        "Cast": lambda _: ([data], {"to": draw(st.sampled_from([1, 6, 7, 9, 11]))}),
        "Mod": lambda _: ([data, row], {"fmod": int(dtype == "float32" or draw(flag))}),
        "MatMul": lambda _: ([data, np.stack([row, row], axis=1)], {}),
        "Range": lambda _: ([np.array(draw(st.integers(-3, 3)), dtype) for _ in range(2)] + [np.array(2, dtype)], {}),
        **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), reduction),
        **dict.fromkeys(
            ("Add", "Sub", "Mul", "Div", "Max", "Min", "Equal", "Less", "Greater"), lambda _: ([data, row], {})
        ),
        **dict.fromkeys(("Neg", "Abs", "Sign", "Size"), lambda _: ([data], {})),
    }
    if opset < 14:
        del choices["Trilu"]
    if dtype == "float32":
        choices.update(dict.fromkeys((*FUNCTIONS, "Ceil", "Floor", "Round"), lambda _: ([data], {})))
    op = draw(st.sampled_from(sorted(choices)))
    inputs, attributes = choices[op](op)
    names = [f"input_{i}" for i in range(len(inputs))]
    return onnx.helper.make_node(op, names, ["result"], **attributes), inputs, opset


@settings(max_examples=300, deadline=None, derandomize=True)
@given(one_node())
def test_computes_what_onnx_runtime_computes(made: tuple[onnx.NodeProto, list[Array], int]) -> None:
    node, inputs, opset = made
    initializers = [onnx.numpy_helper.from_array(v, name) for v, name in zip(inputs, node.input, strict=True)]
    identity = onnx.helper.make_node("Identity", ["result"], ["y"])
    proto = onnx.helper.make_graph([node, identity], "g", [], [onnx.ValueInfoProto(name="y")], initializers)
    model = onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    graph = from_model(onnx.shape_inference.infer_shapes(model, data_prop=True))
    before = copy_graph(graph)
    result = FoldConstants().run(graph, Context())
    if not result.rewrites:
        assert result.near_misses[0].reason in REFUSED
        return
    expected, found = Session(before).run({})["y"], Session(graph).run({})["y"]
    assert found.dtype == expected.dtype
    # Functions of float32 differ in their last two bits; so do sums and products, counted from their largest term.
    relative = 2.0**-20 if node.op_type in (*FUNCTIONS, "ReduceProd") else 0
    absolute = 2.0**-20 * 1e4 if node.op_type in SUMS and expected.dtype == np.float32 else 2.0**-22 * bool(relative)
    np.testing.assert_allclose(found, expected, rtol=relative, atol=absolute)
