from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings

from llmc.compiler.session import Session
from llmc.passes.base import Context, LlmcError, Skip
from llmc.passes.graph import (
    Constant,
    Derived,
    Graph,
    constants,
    copy_graph,
    from_model,
    load_values,
    metadata,
    onnx_dtype,
)
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.precision.half import KEPT_FROM

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def casts_of(graph: Graph) -> int:
    return sum(node.op == "Cast" for node in graph.nodes)


MLP = (
    "(float[N,4] x) => (float[N,2] y) <float[4,4] w = {1,2,-1,1, 0,1,1,-2, 3,1,0,1, -1,1,2,1}, float[4] b = {1,2,3,4},"
    " float[4,2] v = {1,0,0,1,-1,2,1,1}> { h = MatMul(x, w) a = Add(h, b) r = Relu(a) y = MatMul(r, v) }"
)

CONVERTS: dict[str, tuple[str, int, set[str]]] = {
    "products and sums": (MLP, 2, {"MatMul", "Add", "Relu"}),
    "a table that integers read": (
        "(int64[N] i) => (float[N,2] y) <float[2,2] t = {1, 2, 3, 4}> { g = Gather(t, i) y = Exp(g) }",
        1,
        {"Gather", "Exp"},
    ),
    "one Cast for all readers": (
        "(float[N,4] x) => (float[N,4] y) { a = Exp(x) c = Tanh(x) d = Neg(x) e = Add(c, d) y = Add(e, a) }",
        2,
        {"Exp", "Tanh", "Neg", "Add"},
    ),
    "a result that is an output and is read": (
        "(float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Neg(x) a = Abs(y) z = Tanh(a) }",
        3,
        {"Neg", "Abs", "Tanh"},
    ),
    "a cast from integers": (
        "(int64[N,4] x) => (float[N,4] y) <float c = {0.5}> { f = Cast<to=1>(x) y = Mul(f, c) }",
        2,
        {"Mul"},
    ),
    "a filled tensor": (
        "(float[N,4] x) => (float[N,4] y)"
        "{ s = Shape(x) c = ConstantOfShape<value = float[1] {0.25}>(s) y = Add(x, c) }",
        2,
        {"ConstantOfShape", "Add"},
    ),
    "a filled tensor of zeros": (
        "(float[N,4] x) => (float[N,4] y) { s = Shape(x) c = ConstantOfShape(s) y = Add(x, c) }",
        2,
        {"ConstantOfShape", "Add"},
    ),
    "statistics stay in float32": (
        "(float[N,4] x) => (float[N,4] y, float[N,1] d) <float[4] s = {1, 1, 1, 1}>"
        "{ y, m, i = LayerNormalization(x, s) d = Neg(i) }",
        4,
        {"LayerNormalization", "Neg"},
    ),
    "scales of Resize stay in float32": (
        "(float[1,1,4,4] x) => (float[1,1,8,8] y) <float[4] s = {1, 1, 2, 2}> { a = Abs(x) y = Resize(a, , s) }",
        2,
        {"Abs", "Resize"},
    ),
    "bounds beyond float16": (
        "(float[N,4] x) => (float[N,4] y) <float l = {-3.4e38}, float h = {1e5}> { c = Clip(x, l, h) y = Neg(c) }",
        2,
        {"Clip", "Neg"},
    ),
    "the float16 part of a model": (
        "(float[N,4] x) => (float[N,4] y)"
        "{ h = Cast<to=10>(x) a = Abs(h) f = Cast<to=1>(a) b = Neg(f) g = Cast<to=10>(b) c = Tanh(g)"
        " y = Cast<to=1>(c) }",
        2,
        {"Abs", "Neg", "Tanh"},
    ),
    "quantized weights, from before float16 scales": (
        "(float[N,2] x) => (float[N,2] y) <int8[2,2] w = {1, 2, 3, 4}, float s = {0.5}, int8 z = {0}, float q = {0.25}>"
        "{ d = DequantizeLinear(w, s, z) a = QuantizeLinear(x, q, z) b = DequantizeLinear(a, q, z) y = MatMul(b, d) }",
        2,
        {"DequantizeLinear", "QuantizeLinear", "MatMul"},
    ),
}


@pytest.mark.parametrize("name", CONVERTS)
def test_converts(name: str, parse: Any, random_feeds: Any, convert: Any, close: Any, half_operators: Any) -> None:
    text, casts, operators = CONVERTS[name]
    graph = parse(text, opset=17 if "before" in name else 20)
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)
    types = [(t.name, onnx_dtype(t)) for t in (*graph.inputs, *graph.outputs)]
    result = convert(graph, feeds)
    assert half_operators(graph) == operators
    assert casts_of(graph) == casts
    assert [(t.name, onnx_dtype(t)) for t in (*graph.inputs, *graph.outputs)] == types
    assert set(result.asked.values()) <= {"float16"}
    assert not set(result.asked) & set(result.kept)
    close(graph, feeds, expected, roundings=8)


def test_weights_keep_their_names_and_halve(parse: Any, random_feeds: Any, convert: Any) -> None:
    graph = parse(MLP)
    convert(graph, random_feeds(graph))
    assert {c.name: c.dtype for c in constants(graph)} == dict.fromkeys("wbv", np.float16)


def test_inputs_and_outputs_convert_where_asked(parse: Any, random_feeds: Any, convert: Any, close: Any) -> None:
    graph = parse(MLP)
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)
    convert(graph, feeds, inputs_outputs="convert")
    assert casts_of(graph) == 0
    assert [onnx_dtype(t) for t in (*graph.inputs, *graph.outputs)] == [FLOAT16, FLOAT16]
    close(graph, {"x": feeds["x"].astype(np.float16)}, expected, roundings=8)


def test_an_output_that_is_computed_in_float32_converts_too(
    parse: Any, random_feeds: Any, convert: Any, close: Any
) -> None:
    graph = parse("(float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Exp(x) z = Neg(y) }")
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)
    convert(graph, feeds, inputs_outputs="convert", keep=["Exp"])
    assert [onnx_dtype(t) for t in graph.outputs] == [FLOAT16, FLOAT16]
    assert [t.name for t in graph.outputs] == ["y", "z"]
    close(graph, {"x": feeds["x"].astype(np.float16)}, expected, roundings=4)


# Parameters and reporting


def test_keep_takes_names_modules_and_operators(parse: Any, random_feeds: Any, convert: Any) -> None:
    def made() -> Graph:
        graph = parse(MLP)
        for node, module in zip(graph.nodes, ("encoder.0", "encoder.0", "encoder.1", "head"), strict=True):
            node.name = f"/{module}/{node.op}"
            metadata(node)["pkg.torch.onnx.name_scopes"] = repr(["", module, node.name])
        return graph

    feeds = random_feeds(made())
    kept: dict[str, set[str]] = {
        "MatMul": {"/encoder.0/MatMul", "/head/MatMul"},
        "encoder.*": {"/encoder.0/MatMul", "/encoder.0/Add", "/encoder.1/Relu"},
        "/head/*": {"/head/MatMul"},
    }
    for pattern, nodes in kept.items():
        result = convert(made(), feeds, keep=[pattern])
        assert set(result.kept) == nodes
        assert set(result.kept.values()) == {f"`keep` names it: '{pattern}'"}
    with pytest.raises(LlmcError, match=r"convert-fp16: keep pattern 'Matmul' matches no node .*; nearest: 'MatMul'"):
        convert(made(), feeds, keep=["Matmul"])


def test_movement_between_float32_nodes_gets_no_casts(
    parse: Any, random_feeds: Any, convert: Any, close: Any, half_operators: Any
) -> None:
    graph = parse(
        "(float[N,4] x) => (float[N,4] y) <int64[2] flat = {-1, 2}, int64[2] back = {-1, 4}>"
        "{ a = Neg(x) e = Exp(a) r = Reshape(e, flat) t = Transpose(r) u = Transpose(t) s = Reshape(u, back)"
        " f = Exp(s) g = Reshape(f, back) y = Neg(g) }"
    )
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)
    convert(graph, feeds, keep=["Exp"])
    assert casts_of(graph) == 4
    assert half_operators(graph) == {"Neg", "Reshape"}
    close(graph, feeds, expected, roundings=4)


def test_without_data_only_constants_are_checked(parse: Any, convert: Any) -> None:
    result = convert(parse(MLP))
    assert result.warnings == ["no activations were measured: only constants were checked for overflow"]
    assert set(result.asked) == {"h", "a", "r", "y"}


def test_skips_a_graph_without_float32(parse: Any, convert: Any) -> None:
    with pytest.raises(Skip, match="nothing in the graph is bfloat16 or float32"):
        convert(parse("(int64[N] x) => (int64[N] y) { y = Neg(x) }"))


def test_leaves_other_domains_alone() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20, "my.domain": 1]> g (float[N] x) => (float[N] y)'
        "<float[N] b> { a = Neg(x) b = my.domain.Sample(a) y = Abs(b) }"
    )
    graph = from_model(model)
    result = ConvertFp16().run(graph, Context())
    assert result.kept == {"b": "operators of domain 'my.domain' are not known here"}
    assert [onnx_dtype(t) for t in graph.nodes[[n.op for n in graph.nodes].index("Sample")].inputs] == [FLOAT]


def test_large_weights_are_converted_when_read(parse: Any, convert: Any) -> None:
    side = 1 + int(np.sqrt(KEPT_FROM / 4))
    graph = parse(f"(float[N,{side}] x) => (float[N,{side}] y) <float[1,1] w = {{0}}> {{ y = MatMul(x, w) }}")
    weight = np.random.default_rng(0).standard_normal((side, side)).astype(np.float32)
    graph.nodes[0].inputs[1] = Constant("w", weight)
    convert(graph)
    (constant,) = constants(graph)
    assert isinstance(constant._values, Derived)
    assert np.array_equal(load_values(constant), weight.astype(np.float16))


# Any graph

Step = tuple[str, int, int]


def build(steps: Sequence[Step]) -> Graph:
    """A graph over [4, 4] tensors: each step takes two of the tensors so far."""
    names, nodes = ["x", "z"], []
    makers: dict[str, Callable[[str, str], tuple[list[str], dict[str, Any]]]] = {
        "Transpose": lambda a, _: ([a], {"perm": [1, 0]}),
        "Reshape": lambda a, _: ([a, "shape"], {}),
        "MatMul": lambda a, _: ([a, "w"], {}),
        "Where": lambda a, b: (["c", a, b], {}),
        **{op: lambda a, _: ([a], {}) for op in ("Tanh", "Sigmoid", "Identity", "Sin")},
        **{op: lambda a, b: ([a, b], {}) for op in ("Add", "Max", "Sub")},
    }
    for number, (op, first, second) in enumerate(steps):
        inputs, attributes = makers[op](names[first % len(names)], names[second % len(names)])
        names.append(f"t{number}")
        nodes.append(onnx.helper.make_node(op, inputs, [names[-1]], name=f"{op}.{number}", **attributes))
    tensor = onnx.helper.make_tensor_value_info
    outputs = [tensor(name, FLOAT, [4, 4]) for name in {names[-1], names[2 + len(steps) // 2]}]
    initializers = {
        "w": np.eye(4, dtype=np.float32)[::-1] * np.float32(0.5),
        "c": np.tri(4, dtype=bool),
        "shape": np.array([4, 4]),
    }
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [tensor("x", FLOAT, [4, 4]), tensor("z", FLOAT, [4, 4])],
        outputs,
        [onnx.numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    return from_model(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10))


OPERATORS = ["Transpose", "Reshape", "MatMul", "Where", "Tanh", "Sigmoid", "Identity", "Sin", "Add", "Max", "Sub"]
STEP = st.tuples(st.sampled_from(OPERATORS), st.integers(0, 20), st.integers(0, 20))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.lists(STEP, min_size=1, max_size=10),
    keep=st.sets(st.sampled_from(OPERATORS)),
    border=st.booleans(),
    stop=st.none() | st.integers(0, 10),
)
def test_any_graph_stays_valid_and_close(
    steps: list[Step], keep: set[str], border: bool, stop: int | None, convert: Any, close: Any
) -> None:
    graph = build(steps)
    rng = np.random.default_rng(0)
    feeds = {name: rng.uniform(-1, 1, (4, 4)).astype(np.float32) for name in "xz"}
    expected = Session(graph).run(feeds)
    present = {node.op for node in graph.nodes}
    changed = copy_graph(graph)
    result = convert(
        changed,
        feeds,
        stop,
        keep=sorted(keep & present),
        inputs_outputs="convert" if border else "keep",
    )
    assert not set(result.asked) & set(result.kept)
    if stop is None:
        moves = {"Transpose", "Reshape", "Where", "Identity"}
        assert {n.name for n in graph.nodes if n.op not in moves} == set(result.asked) | set(result.kept)
    given_feeds = {t.name: feeds[t.name].astype(t.dtype) for t in changed.inputs}
    # Ten steps, each of which rounds once and doubles what came before at most; values up to 2^10.
    close(changed, given_feeds, expected, roundings=40)
