from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.graph import Graph, from_model, scopes, to_model
from llmc.passes.precision.fold_qdq import FoldQdq

GRIDS = (
    "float s = {0.5}, float t = {0.25}, int8 z = {0}, int8 z5 = {5}, uint8 m = {128}, uint8 m9 = {9}, "
    "float[3] many = {0.5, 0.25, 0.125}, int8[3] zeros = {0, 0, 0}, float tiny = {1e-41}, "
    "int8[2,3] w = {1, -2, 3, 100, -128, 127}, uint8[2,3] wu = {1, 130, 255, 128, 0, 127}, "
    "uint8[2,3] wide = {0, 255, 3, 4, 5, 6}, uint8[2,3] near = {9, 10, 0, 120, 7, 30}, "
    "int8[2,3] short = {9, 10, 0, 120, 7, -30}, uint8 u = {0}, int64[1] one = {1}, "
    "int32[3] b = {100, -200, 300}, float[3] bs = {0.25, 0.125, 0.0625}, float[3] off = {0.25, 0.125, 0.07}, "
    "int64[2] flat = {0, -1}, int64[1] zero = {0}, int64[1] two = {2}, int64[2] perm = {1, 0}"
)
NX2 = f"(float[N,2] x) => (float[N,3] y) <{GRIDS}>"
WEIGHT = "W = DequantizeLinear(w, s, z)"

FIRES = {
    "Q after DQ by one grid": (
        f"(float[N,4] x) => (float[N,4] y) <{GRIDS}> {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
        " r = QuantizeLinear(d, s, z) y = DequantizeLinear(r, s, z) }",
        ["QuantizeLinear", "DequantizeLinear"],
        ["double"],
    ),
    "uint8 around 128": (
        f"{NX2} {{ q = QuantizeLinear(x, s, m) d = DequantizeLinear(q, s, m) {WEIGHT} y = MatMul(d, W) }}",
        ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"],
        ["recentre"],
    ),
    "a uint8 constant around 128": (
        f"{NX2} {{ W = DequantizeLinear(wu, s, m) y = MatMul(x, W) }}",
        ["DequantizeLinear", "MatMul"],
        ["centre-constant"],
    ),
    "a uint8 constant around another number, within int8": (
        f"{NX2} {{ W = DequantizeLinear(near, s, m9) y = MatMul(x, W) }}",
        ["DequantizeLinear", "MatMul"],
        ["centre-constant"],
    ),
    "an int8 constant that does without its zero point": (
        f"{NX2} {{ W = DequantizeLinear(short, s, z5) y = MatMul(x, W) }}",
        ["DequantizeLinear", "MatMul"],
        ["centre-constant"],
    ),
    "an int32 bias": (
        f"{NX2} {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
        " W = DequantizeLinear<axis=1>(w, many, zeros) B = DequantizeLinear<axis=0>(b, bs) y = Gemm(d, W, B) }",
        ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Gemm"],
        ["bias"],
    ),
    "behind Transpose and Reshape, to a product": (
        f"(float[2,N] x) => (float[N,3] y) <{GRIDS}> {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
        f" e = Transpose(d) f = Reshape(e, flat) {WEIGHT} y = MatMul(f, W) }}",
        ["QuantizeLinear", "Transpose", "Reshape", "DequantizeLinear", "DequantizeLinear", "MatMul"],
        ["move", "move"],
    ),
    "behind Slice, to the next Q, which goes": (
        f"(float[N,4] x) => (float[N,2] y) <{GRIDS}> {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
        " e = Slice(d, zero, two, one) r = QuantizeLinear(e, s, z) y = DequantizeLinear(r, s, z) }",
        ["QuantizeLinear", "Slice", "DequantizeLinear"],
        ["move", "double"],
    ),
    "behind MaxPool": (
        f"(float[N,3,4,4] x) => (float[N,3,2,2] y) <{GRIDS}> {{ q = QuantizeLinear(x, s, z)"
        " d = DequantizeLinear(q, s, z) p = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(d)"
        " r = QuantizeLinear(p, s, z) y = DequantizeLinear(r, s, z) }",
        ["QuantizeLinear", "MaxPool", "DequantizeLinear"],
        ["move", "double"],
    ),
    "behind Concat": (
        f"(float[N,1] x, float[N,1] v) => (float[N,3] y) <{GRIDS}> {{ q = QuantizeLinear(x, s, z)"
        " d = DequantizeLinear(q, s, z) r = QuantizeLinear(v, s, z) e = DequantizeLinear(r, s, z)"
        f" c = Concat<axis=1>(d, e) {WEIGHT} y = MatMul(c, W) }}",
        ["QuantizeLinear", "QuantizeLinear", "Concat", "DequantizeLinear", "DequantizeLinear", "MatMul"],
        ["move"],
    ),
    "a transposed weight": (
        "(float[N,3] x) => (float[N,2] y) "
        f"<{GRIDS}> {{ W = DequantizeLinear<axis=1>(w, many, zeros) T = Transpose<perm=[1,0]>(W) y = MatMul(x, T) }}",
        ["DequantizeLinear", "MatMul"],
        ["transposed-weight"],
    ),
    "the levels that another reads too": (
        f"(float[N,2] x) => (float[N,3] y, float[N,2] v) <{GRIDS}> {{ q = QuantizeLinear(x, s, z)"
        f" d = DequantizeLinear(q, s, z) v = Abs(d) e = Reshape(d, flat) {WEIGHT} y = MatMul(e, W) }}",
        ["QuantizeLinear", "DequantizeLinear", "Abs", "Reshape", "DequantizeLinear", "DequantizeLinear", "MatMul"],
        ["move"],
    ),
    "inside a subgraph": (
        f"(bool c, float[N,4] x) => (float[N,4] y) <{GRIDS}> {{ y = If(c) <then_branch = g () => (float[N,4] o) {{"
        " q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) r = QuantizeLinear(d, s, z)"
        " o = DequantizeLinear(r, s, z) }, else_branch = h () => (float[N,4] p) { p = Neg(x) }> }",
        ["If", "QuantizeLinear", "DequantizeLinear", "Neg"],
        ["double"],
    ),
}

X4 = f"(float[N,4] x) => (float[N,4] y) <{GRIDS}>"
LEAVES_ALONE = {
    "another scale": (
        f"{X4} {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) r = QuantizeLinear(d, t, z)"
        " y = DequantizeLinear(r, t, z) }",
        "it quantizes by scale 0.25 and zero point 0 (int8), the levels before it stand for scale 0.5",
    ),
    "another type": (
        f"{X4} {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
        " r = QuantizeLinear(d, s, u) y = DequantizeLinear(r, s, u) }",
        "zero point 0 (uint8)",
    ),
    "a scale that is no normal number": (
        f"{X4} {{ q = QuantizeLinear(x, tiny, z) d = DequantizeLinear(q, tiny, z) r = QuantizeLinear(d, tiny, z)"
        " y = DequantizeLinear(r, tiny, z) }",
        "may not give back each level",
    ),
    "a computed scale": (
        f"(float[N,4] x, float v) => (float[N,4] y) <{GRIDS}> {{ q = QuantizeLinear(x, v, z)"
        " d = DequantizeLinear(q, v, z) r = QuantizeLinear(d, v, z) y = DequantizeLinear(r, v, z) }",
        "is computed or in blocks",
    ),
    "levels that are an output": (
        f"(float[N,4] x) => (int8[N,4] y) <{GRIDS}> {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
        " y = QuantizeLinear(d, s, z) }",
        "'y' is an output of the graph",
    ),
    "uint8 around another number": (
        f"{X4} {{ q = QuantizeLinear(x, s, m9) y = DequantizeLinear(q, s, m9) }}",
        "scale 0.5 and zero point 9 (uint8): TensorRT takes int8 around 0",
    ),
    "uint8 levels that others read": (
        f"(float[N,4] x) => (float[N,4] y, uint8[N,4] v) <{GRIDS}> {{ q = QuantizeLinear(x, s, m)"
        " y = DequantizeLinear(q, s, m) v = Identity(q) }",
        "Identity 'v' reads its levels as they are",
    ),
    "a constant wider than int8": (
        f"{NX2} {{ W = DequantizeLinear(wide, s, m9) y = MatMul(x, W) }}",
        "less its zero points 'wide' runs from -9 to 246",
    ),
    "Concat of two scales": (
        f"(float[N,1] x, float[N,1] v) => (float[N,3] y) <{GRIDS}> {{ q = QuantizeLinear(x, s, z)"
        " d = DequantizeLinear(q, s, z) r = QuantizeLinear(v, t, z) e = DequantizeLinear(r, t, z)"
        f" c = Concat<axis=1>(d, e) {WEIGHT} y = MatMul(c, W) }}",
        "its inputs have different scales",
    ),
    "Concat with something else": (
        f"(float[N,1] x, float[N,1] v) => (float[N,3] y) <{GRIDS}> {{ q = QuantizeLinear(x, s, z)"
        f" d = DequantizeLinear(q, s, z) c = Concat<axis=1>(d, v) {WEIGHT} y = MatMul(c, W) }}",
        "not all its inputs are dequantized",
    ),
    "scales along an axis": (
        f"(float[N,3] x, float[3,3] F) => (float[N,3] y) <{GRIDS}, int64[2] back = {{-1, 3}}> {{"
        " q = QuantizeLinear(x, many, zeros) d = DequantizeLinear(q, many, zeros) e = Reshape(d, back)"
        " y = MatMul(e, F) }",
        "more than one scale",
    ),
    "no product behind it": (
        f"{X4} {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = Reshape(d, flat) y = Abs(e) }}",
        "",
    ),
    "the bias is an output": (
        f"(float[N,4] x) => (float[3] y) <{GRIDS}> {{ y = DequantizeLinear<axis=0>(b, bs) }}",
        "'y' is an output of the graph",
    ),
}


def operators(graph: Graph) -> list[str]:
    return [node.op for scope in scopes(graph) for node in scope.nodes]


def feeds_for(graph: Graph, random_feeds: Any) -> dict[str, Any]:
    """Random inputs that also clip: eight times a normal number, with levels up to 64 at the scale 0.5."""
    feeds = random_feeds(graph)
    return {k: np.abs(v) + 0.1 if v.ndim == 0 and v.dtype.kind == "f" else v * 30 for k, v in feeds.items()}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any, random_feeds: Any) -> None:
    text, expected, rules = FIRES[name]
    graph = parse(text)
    feeds = feeds_for(graph, random_feeds) | ({"c": np.array(True)} if "bool c" in text else {})
    before = Session(graph).run(feeds)
    result = FoldQdq().run(graph, Context())
    assert operators(graph) == expected
    assert [r.rule for r in result.rewrites] == rules
    onnx.checker.check_model(to_model(graph), full_check=True)
    after = Session(graph).run(feeds)
    assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = parse(text)
    before = to_model(graph)
    result = FoldQdq().run(graph, Context())
    assert result.rewrites == []
    assert [n.op_type for n in to_model(graph).graph.node] == [n.op_type for n in before.graph.node]
    assert any(reason in miss.reason for miss in result.near_misses) == bool(reason), result.near_misses


STEPS = {
    "a pair": ["{o}_q = QuantizeLinear({i}, {s}, {z}) {o} = DequantizeLinear({o}_q, {s}, {z})"],
    "moves": [
        "{o} = Transpose<perm=[1,0,2]>({i})",
        "{o} = Reshape({i}, same)",
        "{o} = Slice({i}, zero, two, one)",
        "{o} = Concat<axis=0>({i}, {i})",
        "{o} = MaxPool<kernel_shape=[3], pads=[1,1]>({i})",
        "{o} = Identity({i})",
    ],
}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_chain_gives_the_same_numbers(data: st.DataObject) -> None:
    """Q/DQ pairs by two scales and three zero points, between operators that move elements, before a product."""
    body, last = [], "x"
    for index in range(data.draw(st.integers(2, 8))):
        scale, zero = data.draw(st.sampled_from([("s", "z"), ("s", "m"), ("t", "z"), ("s", "m9"), ("s", "z")]))
        step = data.draw(st.sampled_from([step for steps in STEPS.values() for step in steps * 2]))
        body.append(step.format(i=last, o=f"t{index}", s=scale, z=zero))
        last = f"t{index}"
    text = (
        f"(float[2,4,4] x) => (float[A,B,C] y) <{GRIDS}, int64[3] same = {{0, 0, 0}}, float[4,4] F = "
        f"{{1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}}> {{ {' '.join(body)} y = MatMul({last}, F) }}"
    )
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {text}')
    graph = from_model(model)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4, 4)).astype(np.float32) * 40}
    before = Session(graph).run(feeds)["y"]
    pairs = operators(graph).count("QuantizeLinear")
    result = FoldQdq().run(graph, Context())
    onnx.checker.check_model(to_model(graph))
    assert np.array_equal(Session(graph).run(feeds)["y"], before)
    assert pairs - operators(graph).count("QuantizeLinear") == sum(r.rule == "double" for r in result.rewrites)


def test_warns_of_a_bias_scale_that_does_not_fit(parse: Any) -> None:
    graph = parse(FIRES["an int32 bias"][0].replace("(b, bs)", "(b, off)"))
    result = FoldQdq().run(graph, Context())
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("the scale of bias 'B' is not the product of the other scales of Gemm 'y'")


def test_recentred_levels_are_int8_around_0(parse: Any) -> None:
    graph = parse(FIRES["uint8 around 128"][0])
    FoldQdq().run(graph, Context())
    assert {n.inputs[2].dtype for n in graph.nodes if n.op.endswith("Linear")} == {np.dtype(np.int8)}
    assert not any(n.inputs[2].values.any() for n in graph.nodes if n.op.endswith("Linear"))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
def test_every_level_comes_back(dtype: Any, scale_dtype: Any) -> None:
    """What `double` stands on: round((q − z) · s / s) + z = q for every q and z, and scales over the whole range."""
    info, rng = np.iinfo(dtype), np.random.default_rng(0)
    levels = np.arange(info.min, info.max + 1)
    limits = np.finfo(scale_dtype)
    low, high = np.log2(float(limits.smallest_normal)), np.log2(float(limits.max) / 256)
    for scale in np.exp2(rng.uniform(low, high, 2000)).astype(scale_dtype):
        for zero in (info.min, 0, 3, info.max):
            values = (levels - zero).astype(scale_dtype) * scale
            assert np.array_equal(np.rint(values / scale) + zero, levels)


@pytest.mark.parametrize("stop_after", range(4))
def test_stops_after_any_rewrite_with_the_same_results(stop_after: int, parse: Any, random_feeds: Any) -> None:
    graph = parse(FIRES["behind MaxPool"][0])
    feeds = feeds_for(graph, random_feeds)
    expected = Session(graph).run(feeds)["y"]
    result = FoldQdq().run(graph, Context(Ledger(stop_after)))
    assert len(result.rewrites) == min(stop_after, 2)
    assert np.array_equal(Session(graph).run(feeds)["y"], expected)


def test_time_is_linear_in_the_chain() -> None:
    """5,000 pairs in a row: a second where each tensor is touched once."""
    count = 5_000
    nodes = []
    for i in range(count):
        nodes.append(onnx.helper.make_node("QuantizeLinear", [f"x{i}", "s", "z"], [f"q{i}"]))
        nodes.append(onnx.helper.make_node("DequantizeLinear", [f"q{i}", "s", "z"], [f"x{i + 1}"]))
    constants = [
        onnx.numpy_helper.from_array(np.array(0.5, np.float32), "s"),
        onnx.numpy_helper.from_array(np.array(0, np.int8), "z"),
    ]
    infos = [onnx.helper.make_tensor_value_info(name, 1, ["N"]) for name in ("x0", f"x{count}")]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", infos[:1], infos[1:], constants))
    graph = from_model(model)
    assert len(FoldQdq().run(graph, Context()).rewrites) == count - 1
    assert operators(graph) == ["QuantizeLinear", "DequantizeLinear"]
