from __future__ import annotations

import sys
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.graph import Graph, constants, copy_graph, from_model, numpy_dtype, scopes, to_model
from llmc.passes.simplify.eliminate_identity import EliminateIdentity
from llmc.passes.simplify.views import PLAIN, holds

X = "(float[N,2,3] x) => (float[N,2,3] y)"
ANY = "(float[N,2,3] x) => (float[A,B,C] y)"
TWO = "(float[A,B] x) => (float[C,D] y)"

FIRES = {
    "Identity": (f"{X} {{ a = Identity(x) y = Relu(a) }}", ["Relu"]),
    "a chain of Identity to an output": (f"{X} {{ a = Relu(x) b = Identity(a) y = Identity(b) }}", ["Relu"]),
    "Identity of a constant": (
        f"{X} <float[3] c = {{1, 2, 3}}> {{ a = Identity(c) y = Add(x, a) }}",
        ["Add"],
    ),
    "an output of which another node reads": (
        "(float[N] x) => (float[N] y, float[N] z) { a = Abs(x) y = Identity(a) z = Exp(a) }",
        ["Abs", "Exp"],
    ),
    "one tensor that is two outputs": (
        "(float[N] x) => (float[N] y, float[N] z) { a = Abs(x) y = Identity(a) z = Identity(a) }",
        ["Abs", "Identity"],
    ),
    "Dropout": (f"{X} {{ a = Dropout(x) y = Relu(a) }}", ["Relu"]),
    "Dropout told not to train": (
        f"{X} <float r = {{0.5}}, bool t = {{0}}> {{ a = Dropout(x, r, t) y = Relu(a) }}",
        ["Relu"],
    ),
    "Dropout between two outer tensors": (f"{X} {{ y = Dropout(x) }}", ["Identity"]),
    "Cast to the type that is there": (f"{X} {{ a = Cast<to=1>(x) y = Relu(a) }}", ["Relu"]),
    "CastLike to the type that is there": (
        "(float[N] x, float[M] z) => (float[N] y) { a = CastLike(x, z) y = Relu(a) }",
        ["Relu"],
    ),
    "Cast there and back": (
        "(float16[N] x) => (float16[N] y) { a = Cast<to=1>(x) b = Cast<to=10>(a) y = Relu(b) }",
        ["Relu"],
    ),
    "integers there and back": (
        "(int32[N] x) => (int32[N] y) { a = Cast<to=7>(x) b = Cast<to=6>(a) y = Neg(b) }",
        ["Neg"],
    ),
    "Cast by way of a larger type": (
        "(bool[N] x) => (float[N] y) { a = Cast<to=7>(x) b = Cast<to=1>(a) y = Relu(b) }",
        ["Cast", "Relu"],
    ),
    "three Casts": (
        "(int8[N] x) => (float[N] y) { a = Cast<to=6>(x) b = Cast<to=7>(a) c = Cast<to=1>(b) y = Relu(c) }",
        ["Cast", "Relu"],
    ),
    "Transpose that keeps the order": (f"{X} {{ a = Transpose<perm=[0,1,2]>(x) y = Relu(a) }}", ["Relu"]),
    "Transpose of a vector": ("(float[N] x) => (float[N] y) { a = Transpose(x) y = Relu(a) }", ["Relu"]),
    "Transposes that cancel": (
        f"{X} {{ a = Transpose<perm=[2,0,1]>(x) b = Transpose<perm=[1,2,0]>(a) y = Relu(b) }}",
        ["Relu"],
    ),
    "Transposes that reverse": (f"{X} {{ a = Transpose(x) b = Transpose(a) y = Relu(b) }}", ["Relu"]),
    "Transposes that are one": (
        f"{ANY} {{ a = Transpose(x) b = Transpose<perm=[1,0,2]>(a) y = Relu(b) }}",
        ["Transpose", "Relu"],
    ),
    "four Transposes": (
        f"{X} {{ a = Transpose<perm=[1,0,2]>(x) b = Transpose<perm=[0,2,1]>(a) c = Transpose<perm=[0,2,1]>(b)"
        " d = Transpose<perm=[1,0,2]>(c) y = Relu(d) }",
        ["Relu"],
    ),
    "Reshape to the same shape": (f"{X} <int64[3] s = {{-1, 2, 3}}> {{ a = Reshape(x, s) y = Relu(a) }}", ["Relu"]),
    "Reshape that copies": (f"{X} <int64[3] s = {{0, 0, -1}}> {{ a = Reshape(x, s) y = Relu(a) }}", ["Relu"]),
    "Reshape of Reshape": (
        f"{ANY} <int64[1] s = {{-1}}, int64[3] t = {{-1, 3, 2}}> {{ a = Reshape(x, s) b = Reshape(a, t) y = Relu(b) }}",
        ["Reshape", "Relu"],
    ),
    "Reshape of Reshape that copies a number": (
        f"{ANY} <int64[3] s = {{-1, 3, 2}}, int64[3] t = {{-1, 0, 1}}>"
        "{ a = Reshape(x, s) b = Reshape(a, t) y = Relu(b) }",
        ["Reshape", "Relu"],
    ),
    "Reshape of Reshape that copies what the first one copied": (
        "(float[N,M,4] x) => (float[A,B,C] y) <int64[4] s = {0, 0, 2, 2}, int64[3] t = {0, 0, -1}>"
        "{ a = Reshape(x, s) b = Reshape(a, t) y = Relu(b) }",
        ["Relu"],
    ),
    "Reshape of Reshape that copies one dimension": (
        "(float[N,4] x) => (float[A,B,C] y) <int64[2] s = {4, -1}, int64[3] t = {2, 0, 2}>"
        "{ a = Flatten(x) b = Reshape(a, s) c = Reshape(b, t) y = Relu(c) }",
        ["Reshape", "Relu"],
    ),
    "Reshape of Flatten": (
        f"{ANY} <int64[3] t = {{-1, 3, 2}}> {{ a = Flatten(x) b = Reshape(a, t) y = Relu(b) }}",
        ["Reshape", "Relu"],
    ),
    "Flatten of Reshape": (
        f"{TWO} <int64[3] t = {{-1, 3, 1}}> {{ a = Reshape(x, t) b = Flatten(a) y = Relu(b) }}",
        ["Reshape", "Relu"],
    ),
    "Squeeze of Unsqueeze": (
        "(float[N,M] x) => (float[N,M] y) <int64[2] a = {-1, 1}> { u = Unsqueeze(x, a) s = Squeeze(u, a) y = Relu(s) }",
        ["Relu"],
    ),
    "Unsqueeze of Squeeze": (
        "(float[N,1] x) => (float[N,1] y) <int64[1] a = {1}> { s = Squeeze(x, a) u = Unsqueeze(s, a) y = Relu(u) }",
        ["Relu"],
    ),
    "Unsqueeze of Unsqueeze": (
        "(float[N,M] x) => (float[A,B,C,D] y) <int64[1] a = {1}, int64[1] b = {-2}>"
        "{ u = Unsqueeze(x, a) v = Unsqueeze(u, b) y = Relu(v) }",
        ["Unsqueeze", "Relu"],
    ),
    "Squeeze of Squeeze": (
        "(float[1,N,1,M] x) => (float[A,B] y) <int64[1] a = {0}, int64[1] b = {1}>"
        "{ u = Squeeze(x, a) v = Squeeze(u, b) y = Relu(v) }",
        ["Squeeze", "Relu"],
    ),
    "Flatten of a matrix": ("(float[2,3] x) => (float[2,3] y) { a = Flatten(x) y = Relu(a) }", ["Relu"]),
    "Expand to what it is": (f"{X} <int64[2] s = {{1, 3}}> {{ a = Expand(x, s) y = Relu(a) }}", ["Relu"]),
    "Expand to its own shape": (f"{X} {{ s = Shape(x) a = Expand(x, s) y = Relu(a) }}", ["Relu"]),
    "Tile by ones": (f"{X} <int64[3] s = {{1, 1, 1}}> {{ a = Tile(x, s) y = Relu(a) }}", ["Relu"]),
    "Slice of everything": (
        f"{X} <int64[2] s = {{0, -2}}, int64[2] e = {{9223372036854775807, 2}}, int64[2] a = {{0, 1}}>"
        "{ b = Slice(x, s, e, a) y = Relu(b) }",
        ["Relu"],
    ),
    "Pad of zero": (f"{X} <int64[6] p = {{0, 0, 0, 0, 0, 0}}> {{ a = Pad(x, p) y = Relu(a) }}", ["Relu"]),
    "Concat, Max, Min, Sum, Mean of one": (
        f"{X} {{ a = Concat<axis=1>(x) b = Max(a) c = Min(b) d = Sum(c) e = Mean(d) y = Relu(e) }}",
        ["Relu"],
    ),
    "Split into one": (f"{X} {{ a = Split<axis=1, num_outputs=1>(x) y = Relu(a) }}", ["Relu"]),
    "neutral numbers": (
        f"{X} <float z = {{0}}, float[1] o = {{1}}, float[1,3] p = {{1, 1, 1}}>"
        "{ a = Add(z, x) b = Sub(a, z) c = Mul(o, b) d = Div(c, p) e = Pow(d, o) y = Relu(e) }",
        ["Relu"],
    ),
    "a zero of the shape that is there": (
        "(float[2,3] x) => (float[2,3] y) <float[2,3] z = {0, 0, 0, 0, 0, 0}> { a = Add(x, z) y = Relu(a) }",
        ["Relu"],
    ),
    "a zero in front of a tensor of any rank": (
        "(float[N] x, int64[K] s) => (float y) <float z = {0}>"
        "{ a = Reshape(x, s) b = Add(z, a) y = ReduceMax<keepdims=0>(b) }",
        ["Reshape", "ReduceMax"],
    ),
    "true and false": (
        "(bool[N] x) => (bool[N] y) <bool t = {1}, bool f = {0}>"
        "{ a = And(x, t) b = Or(f, a) c = Xor(b, f) y = Not(c) }",
        ["Not"],
    ),
    "Where with a constant condition": (
        f"{X} <bool t = {{1}}, bool[3] f = {{0, 0, 0}}, float o = {{2}}>"
        "{ a = Where(t, x, o) b = Where(f, o, a) y = Relu(b) }",
        ["Relu"],
    ),
    "Where of the same": ("(bool[N] c, float[N] x) => (float[N] y) { a = Where(c, x, x) y = Relu(a) }", ["Relu"]),
    "Resize by 1": (
        "(float[N,2,3,4] x) => (float[N,2,3,4] y) <float[4] s = {1, 1, 1, 1}>"
        '{ a = Resize<mode="linear">(x, "", s) y = Relu(a) }',
        ["Relu"],
    ),
    "Resize to its size": (
        "(float[1,2,3,4] x) => (float[1,2,3,4] y) <int64[4] s = {1, 2, 3, 4}>"
        '{ a = Resize<mode="cubic">(x, "", "", s) y = Relu(a) }',
        ["Relu"],
    ),
    "Clip without bounds": (f"{X} {{ a = Clip(x) y = Relu(a) }}", ["Relu"]),
    "reduction of no axes": (f"{X} {{ a = ReduceSum<noop_with_empty_axes=1>(x) y = Relu(a) }}", ["Relu"]),
    "done twice, undone": (f"{X} {{ a = Relu(x) b = Relu(a) c = Neg(b) d = Neg(c) y = Exp(d) }}", ["Relu", "Exp"]),
    "blocks of one": (
        "(float[1,2,3,4] x) => (float[1,2,3,4] y) { a = DepthToSpace<blocksize=1>(x) y = Relu(a) }",
        ["Relu"],
    ),
    "what only the removed node read": (
        "(float[N,M] x, float[N,M] z) => (float[N,M] y) <int64 o = {1}>"
        "{ s = Shape(z) t = Mul(s, o) b = ConstantOfShape(t) c = CastLike(x, b) y = Relu(c) }",
        ["Relu"],
    ),
    "inside a subgraph, and its outer reader": (
        "(bool q, float[2] x) => (float[2] y) { a = Identity(x) y = If(q) <"
        "then_branch = t () => (float[2] z) { b = Identity(a) z = Relu(b) },"
        "else_branch = e () => (float[2] w) { c = Exp(a) w = Identity(c) }> }",
        ["If", "Relu", "Exp"],
    ),
}

FILL = (
    "n = NonZero(m) i = Transpose<perm = [1, 0]>(n) ends = Constant<value_ints = [-1]>() r = Reshape(m, ends) "
    "c = Cast<to = 7>(r) k = ReduceSum(c) "
)
FIRES |= {
    "one value where a mask is true": (
        f"(float[N,M] x) => (float[N,M] y) <float zero = {{0}}, float v = {{2.5}}> "
        f"{{ m = Less(x, zero) {FILL} e = Expand(v, k) y = ScatterND(x, i, e) }}",
        ["Less", "Where"],
    ),
    "a computed value where a mask is true": (
        f"(float[N,M] x, float[1] z) => (float[N,M] y) <float zero = {{0}}> "
        f"{{ m = Less(x, zero) v = Exp(z) {FILL} e = Expand(v, k) y = ScatterND(x, i, e) }}",
        ["Less", "Exp", "Where"],
    ),
}
LEAVES_ALONE = {
    "a mask that may be narrower": (
        f"(float[N,M] x, bool[N,K] m) => (float[N,M] y) <float v = {{2.5}}> "
        f"{{ {FILL} e = Expand(v, k) y = ScatterND(x, i, e) }}",
        "the mask 'm' is not known to have the shape of 'x'",
    ),
    "values of their own where a mask is true": (
        f"(float[N,M] x, bool[N,M] m, float[K] e) => (float[N,M] y, int64[1] k) {{ {FILL} y = ScatterND(x, i, e) }}",
        "",
    ),
    "a value that is added where a mask is true": (
        f"(float[N,M] x, bool[N,M] m) => (float[N,M] y) <float v = {{2.5}}> "
        f'{{ {FILL} e = Expand(v, k) y = ScatterND<reduction = "add">(x, i, e) }}',
        "",
    ),
    "an input that is an output": (
        "(float[N] x) => (float[N] y) { y = Identity(x) }",
        "'y' is an output of the graph, and so is or cannot be 'x'",
    ),
    "a subgraph that gives back an outer tensor": (
        "(bool q, float[2] x) => (float[2] y) { y = If(q) <then_branch = t () => (float[2] z) { z = Identity(x) },"
        "else_branch = e () => (float[2] w) { w = Exp(x) }> }",
        "'z' is an output of the graph, and so is or cannot be 'x'",
    ),
    "Dropout whose mask is used": (
        "(float[N] x) => (float[N] y, bool[N] m) { y, m = Dropout(x) }",
        "its output 'm' is used too",
    ),
    "Dropout that may train": (
        "(float[N] x, bool t) => (float[N] y) <float r = {0.5}> { y = Dropout(x, r, t) }",
        "it drops where 't' is true",
    ),
    "Cast to another type": ("(float[N] x) => (float16[N] y) { y = Cast<to=10>(x) }", ""),
    "Casts that round": (
        "(float[N] x) => (float[N] y) { a = Cast<to=10>(x) y = Cast<to=1>(a) }",
        "float16 does not hold every float32",
    ),
    "Casts that saturate": (
        "(float[N] x) => (float[N] y) { a = Cast<to=17>(x) y = Cast<to=1>(a) }",
        "",
    ),
    "Casts that wrap": (
        "(int64[N] x) => (int64[N] y) { a = Cast<to=6>(x) y = Cast<to=7>(a) }",
        "int32 does not hold every int64",
    ),
    "Transpose of an unknown rank": (
        "(float[N] x, int64[K] s) => (float y) { a = Reshape(x, s) b = Transpose(a) y = ReduceMax<keepdims=0>(b) }",
        "",
    ),
    "Reshape to another shape": ("(float[N,4] x) => (float[A,B] y) <int64[2] s = {-1, 2}> { y = Reshape(x, s) }", ""),
    "Reshape that may move an empty dimension": (
        "(float[N,M] x) => (float[A,B] y) <int64[2] s = {0, 7}> { y = Reshape(x, s) }",
        "",
    ),
    "Reshape that copies an unknown dimension of a Reshape": (
        "(float[N,M] x) => (float[A,B,C] y) <int64[2] s = {4, -1}, int64[3] t = {2, 0, -1}>"
        "{ a = Reshape(x, s) y = Reshape(a, t) }",
        "a 0 in its shape means a dimension of 'a', which is not known",
    ),
    "Reshape of Reshape to a computed shape": (
        "(float[N,M] x, int64[2] t) => (float[A,B] y) <int64[1] s = {-1}> { a = Reshape(x, s) y = Reshape(a, t) }",
        "its shape is computed in each run, and a 0 in it would mean a dimension of 'a'",
    ),
    "Expand to more": (
        "(float[N,1] x) => (float[N,3] y) <int64[2] s = {1, 3}> { y = Expand(x, s) }",
        "",
    ),
    "Slice of less": (
        "(float[N,4] x) => (float[A,B] y) <int64[1] s = {0}, int64[1] e = {3}, int64[1] a = {1}>"
        "{ y = Slice(x, s, e, a) }",
        "",
    ),
    "Slice of an unknown dimension up to a number": (
        "(float[N] x) => (float[A] y) <int64[1] s = {0}, int64[1] e = {1000}> { y = Slice(x, s, e) }",
        "",
    ),
    "Slice backwards": (
        "(float[4] x) => (float[4] y) <int64[1] s = {-1}, int64[1] e = {-9}, int64[1] a = {0}, int64[1] d = {-1}>"
        "{ y = Slice(x, s, e, a, d) }",
        "",
    ),
    "a zero that broadcasts": (
        "(float[N] x) => (float[2,N] y) <float[2,1] z = {0, 0}> { y = Add(x, z) }",
        "'z' may broadcast 'x' to another shape",
    ),
    "a zero that may broadcast": (
        "(float[N] x) => (float[M] y) <float[3] z = {0, 0, 0}> { y = Add(x, z) }",
        "'z' may broadcast 'x' to another shape",
    ),
    "a zero from which is subtracted": ("(float[N] x) => (float[N] y) <float z = {0}> { y = Sub(z, x) }", ""),
    "one number that is not neutral": (
        "(float[3] x) => (float[3] y) <float[3] z = {0, 0, 1}> { y = Add(x, z) }",
        "",
    ),
    "Where that broadcasts": (
        "(float[1] x, float[M] z) => (float[M] y) <bool t = {1}> { y = Where(t, x, z) }",
        "'z' may broadcast 'x' to another shape",
    ),
    "Resize that crops": (
        "(float[1,1,3,4] x) => (float[1,1,3,4] y) <float[4] s = {1, 1, 1, 1},"
        "float[8] r = {0, 0, 0, 0, 1, 1, 0.5, 0.5}>"
        '{ y = Resize<coordinate_transformation_mode="tf_crop_and_resize">(x, r, s) }',
        "coordinate_transformation_mode 'tf_crop_and_resize' moves elements even where the size stays",
    ),
    "another domain's Identity": ("(float[N] x) => (float[N] y) { y = other.Identity(x) }", ""),
}


def operators(graph: Graph) -> list[str]:
    return [node.op for scope in scopes(graph) for node in scope.nodes]


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Bit for bit, but for the sign of zero."""
    return all(np.array_equal(found[k], v, equal_nan=v.dtype.kind == "f") for k, v in expected.items())


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any, random_feeds: Any) -> None:
    text, left = FIRES[name]
    graph = parse(text)
    feeds = random_feeds(graph)
    feeds |= {"s": np.array([1, 1, -1])} if "int64[K] s" in text else {}
    expected = Session(graph).run(feeds)
    result = EliminateIdentity().run(graph, Context())
    assert operators(graph) == left
    assert result.rewrites
    onnx.checker.check_model(to_model(graph), full_check=True)
    assert same(Session(graph).run(feeds), expected)
    assert EliminateIdentity().run(graph, Context()).rewrites == []


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = from_model(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20, "other": 1]> g {text}'))
    before = to_model(graph)
    result = EliminateIdentity().run(graph, Context())
    assert result.rewrites == []
    assert [node.op_type for node in before.graph.node] == [node.op for node in graph.nodes]
    assert [miss.reason for miss in result.near_misses] == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("body", "opset", "left"),
    [
        ("a = Dropout<is_test=1>(x) y = Relu(a)", 6, ["Relu"]),
        ("a = Dropout(x) y = Relu(a)", 6, ["Dropout", "Relu"]),
        ("a = Dropout(x) y = Relu(a)", 7, ["Relu"]),
        ("a = Slice<starts=[0], ends=[2], axes=[1]>(x) y = Relu(a)", 9, ["Relu"]),
        ("a = Pad<pads=[0,0,0,0,0,0]>(x) y = Relu(a)", 10, ["Relu"]),
        ("a = Unsqueeze<axes=[0]>(x) b = Squeeze<axes=[0]>(a) y = Relu(b)", 11, ["Relu"]),
        ("a = Unsqueeze<axes=[0]>(x) b = Unsqueeze<axes=[0]>(a) c = Squeeze<axes=[0,1]>(b) y = Relu(c)", 11, ["Relu"]),
        ("a = Clip<min=0.0>(x) y = Relu(a)", 6, ["Clip", "Relu"]),
        ("a = Clip(x) y = Relu(a)", 6, ["Relu"]),
    ],
)
def test_reads_early_opsets(body: str, opset: int, left: list[str], parse: Any) -> None:
    graph = parse(f"{X} {{ {body} }}", opset=opset)
    EliminateIdentity().run(graph, Context())
    assert operators(graph) == left


def test_a_cast_loses_nothing_exactly_where_numpy_agrees() -> None:
    """Every value of up to 16 bits, there and back; wider integers by their limits and the odd values near them."""
    for narrow in PLAIN:
        source = numpy_dtype(narrow)
        bits = 8 * source.itemsize
        if source.kind == "b":
            values = np.array([False, True])
        elif bits <= 16:
            values = np.arange(2**bits, dtype=np.uint32).astype(f"u{source.itemsize}").view(source)
        elif source.kind in "iu":
            limits = np.iinfo(source)
            values = np.array([limits.min, limits.max, limits.max // 2, 2**24 + 1, 1], dtype=source)
        else:
            values = np.array([np.finfo(source).max, np.finfo(source).smallest_subnormal, 1 / 3, -1], dtype=source)
        for wide in PLAIN:
            with np.errstate(all="ignore"):
                back = values.astype(numpy_dtype(wide)).astype(source)
                same_sign = (values < 0) == (values.astype(numpy_dtype(wide)) < 0)
                kept = bool((((back == values) & same_sign) | (values != values)).all())
            assert holds(wide, narrow) == kept, (numpy_dtype(wide), source)


def test_keeps_where_a_node_came_from(parse: Any) -> None:
    graph = parse(f"{ANY} {{ a = Transpose(x) y = Transpose<perm=[1,0,2]>(a) }}")
    graph.nodes[1].metadata = {"pkg.torch.onnx.name_scopes": "['', 'layer', 'y']"}
    (applied,) = EliminateIdentity().run(graph, Context()).rewrites
    assert (applied.number, applied.rule, applied.module) == (1, "transposed-before", "layer")
    assert graph.nodes[0].metadata == {"pkg.torch.onnx.name_scopes": "['', 'layer', 'y']"}


@pytest.mark.parametrize("stop_after", range(5))
def test_stops_after_any_rewrite_with_the_same_results(stop_after: int, parse: Any, random_feeds: Any) -> None:
    graph = parse(FIRES["four Transposes"][0])
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)
    result = EliminateIdentity().run(graph, Context(Ledger(stop_after)))
    assert [a.number for a in result.rewrites] == list(range(1, min(stop_after, 3) + 1))
    onnx.checker.check_model(to_model(graph), full_check=True)
    assert same(Session(graph).run(feeds), expected)


# Chains of what the pass looks for, with numbers that nobody chose


@st.composite
def chain(draw: Any) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Up to eight nodes, each of the last tensor; every one may be an output too."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    symbolic = [draw(st.sampled_from([size, f"d{axis}"])) for axis, size in enumerate(shape)]
    values = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape) - 3
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    last, current, outputs = "x", values, []
    for index in range(draw(st.integers(1, 8))):
        op, attributes, others, current = draw(step(current))
        names = [f"c{index}_{i}" for i in range(len(others))]
        initializers += [onnx.numpy_helper.from_array(v, n) for v, n in zip(others, names, strict=True)]
        inputs = [last, *names]
        if op in ("Add", "Mul") and draw(st.booleans()):
            inputs.reverse()
        nodes.append(onnx.helper.make_node(op, inputs, [f"t{index}"], **attributes))
        last = f"t{index}"
        if draw(st.integers(0, 3)) == 0:
            outputs.append(last)
    outputs = list(dict.fromkeys([*outputs, last]))
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, symbolic)],
        [onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs],
        initializers,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return model, {"x": values}


@st.composite
def step(draw: Any, value: Any) -> tuple[str, dict[str, Any], list[Any], Any]:
    """Operator, attributes, constants, and what NumPy says that comes out."""
    rank, shape = value.ndim, value.shape
    op = draw(
        st.sampled_from(["Transpose", "Reshape", "Flatten", "Unsqueeze", "Squeeze", "Add", "Mul", "Expand", "Slice"])
    )
    if op == "Transpose" and rank:
        order = draw(st.permutations(range(rank)))
        return op, {"perm": list(order)}, [], value.transpose(order)
    if op == "Reshape":
        target = draw(
            st.sampled_from([list(shape), list(shape[::-1]), [-1], [*shape, 1], [int(value.size)], [0] * rank])
        )
        if target and 0 not in target and draw(st.booleans()):
            target[draw(st.integers(0, len(target) - 1))] = -1
        if -1 not in target and len(target) <= rank:
            target = [0 if t == s and draw(st.booleans()) else t for t, s in zip(target, shape, strict=False)]
        copied = [shape[i] if t == 0 else t for i, t in enumerate(target)]
        return op, {}, [np.array(target, np.int64)], value.reshape(copied)
    if op == "Flatten":
        axis = draw(st.integers(0, rank))
        return op, {"axis": axis}, [], value.reshape(int(np.prod(shape[:axis])), -1)
    if op == "Unsqueeze" and rank < 5:
        axes = draw(st.lists(st.integers(-rank - 1, rank), min_size=1, max_size=1))
        return op, {}, [np.array(axes, np.int64)], np.expand_dims(value, tuple(axes))
    if op == "Squeeze" and 1 in shape:
        axis = draw(st.sampled_from([a - draw(st.sampled_from([0, rank])) for a, s in enumerate(shape) if s == 1]))
        return op, {}, [np.array([axis], np.int64)], value.squeeze(axis)
    if op == "Expand":
        target = draw(st.sampled_from([list(shape), [1], [1, *shape], [2, *shape], [*shape[:-1], 1] if rank else [1]]))
        return op, {}, [np.array(target, np.int64)], value * np.ones(target, np.float32)
    if op == "Slice" and rank:
        axis, end = draw(st.integers(0, rank - 1)), draw(st.sampled_from([1, 4, 2**31 - 1, 2**63 - 1]))
        start = draw(st.sampled_from([0, -4]))
        bounds = [np.array([n], np.int64) for n in (start, end, axis)]
        return op, {}, bounds, value[tuple([slice(None)] * axis + [slice(start, end)])]
    other = np.full(draw(st.sampled_from([(), (1,), (1, 1), shape, shape[-1:]])), op == "Mul", np.float32)
    return ("Mul", {}, [other], value * other) if op == "Mul" else ("Add", {}, [other], value + other)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(chain())
def test_chains_compute_the_same(case: tuple[onnx.ModelProto, dict[str, Any]]) -> None:
    model, feeds = case
    graph = from_model(model)
    expected = Session(graph).run(feeds)
    changed = copy_graph(graph)
    EliminateIdentity().run(changed, Context())
    assert len(changed.nodes) <= len(graph.nodes)
    onnx.checker.check_model(to_model(changed), full_check=True)
    found = Session(changed).run(feeds)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert np.array_equal(found[name], value)


# Time


def calls(graph: Graph) -> int:
    """How many functions Python enters while the pass runs."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    sys.setprofile(counted)
    try:
        EliminateIdentity().run(graph, Context())
    finally:
        sys.setprofile(None)
    return count


def long_chain(length: int) -> Graph:
    """Transposes one after another, Identity of one tensor side by side, and one Concat of every tenth of them."""
    nodes, last = [], "x"
    for index in range(length // 2):
        nodes.append(onnx.helper.make_node("Transpose", [last], [f"t{index}"], perm=[1, 0] if index % 3 else [0, 1]))
        nodes.append(onnx.helper.make_node("Identity", ["x"], [f"i{index}"]))
        last = f"t{index}"
    nodes.append(onnx.helper.make_node("Sum", [f"i{index}" for index in range(0, length // 2, 10)], ["s"]))
    nodes.append(onnx.helper.make_node("Add", [last, "s"], ["y"]))
    info = [onnx.helper.make_tensor_value_info(name, 1, [2, 2]) for name in "xy"]
    return from_model(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", info[:1], info[1:])))


def test_time_is_linear_in_the_number_of_nodes() -> None:
    small, large = calls(long_chain(2_000)), calls(long_chain(20_000))
    assert large < 11 * small
    graph = long_chain(20_000)
    EliminateIdentity().run(graph, Context())
    assert {"Identity"}.isdisjoint(operators(graph))
    assert len(graph.nodes) <= 3
    assert not list(constants(graph))
