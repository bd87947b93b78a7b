from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, LlmcError, PassResult, Skip
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    copy_graph,
    digest,
    load_values,
    metadata,
    module_of,
    to_model,
)
from llmc.passes.precision.calibration import Clipping
from llmc.passes.precision.levels import INT8
from llmc.passes.precision.quantize_int8 import QuantizeInt8

RNG = np.random.default_rng(0)
scales, quantize = INT8.scales, INT8.quantize


class Peaks:
    """Activations whose largest magnitudes are known beforehand; `default` for those not named."""

    def __init__(self, default: float = 4.0, **named: float) -> None:
        self.default, self.named = default, named
        self.asked: list[tuple[list[str], str, float, int]] = []

    def amax(
        self, graph: Graph, tensors: Sequence[str], *, method: str, percentile: float, samples: int
    ) -> Mapping[str, float]:
        assert set(tensors) <= set(graph.tensors())
        self.asked.append((list(tensors), method, percentile, samples))
        return {name: self.named.get(name, self.default) for name in tensors}

    def absolute_maximum(self, graph: Graph, tensors: Sequence[str]) -> Mapping[str, float]:
        raise AssertionError(f"this pass has no use for the peaks of {tensors} in {graph.name}")


def run(graph: Graph, activations: Peaks | None = None, stop_after: int | None = None, **parameters) -> PassResult:
    """The pass without bias correction, which needs more of the activations than their peaks."""
    step = QuantizeInt8(correct_bias=False, **parameters)
    return step.run(graph, Context(Ledger(stop_after), activations or Peaks()))


def with_weights(graph: Graph, **values: Array) -> Graph:
    """The inputs that `values` names become constants; tuples are shapes of random ones."""
    for tensor in list(graph.inputs):
        if tensor.name in values:
            tensor.to_constant(values[tensor.name])
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    return graph


def random(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def operators(graph: Graph) -> dict[str, int]:
    return dict(Counter(node.op for node in graph.nodes))


def find(graph: Graph, op: str) -> list[Node]:
    return [node for node in graph.nodes if node.op == op]


def maker(node: Node, position: int) -> Node:
    (found,) = node.inputs[position].inputs
    return found


def dequantized(node: Node) -> Array:
    """What a DequantizeLinear with constant input gives."""
    stored, scale, zero = (load_values(tensor) for tensor in node.inputs)
    assert stored.dtype == zero.dtype == np.int8
    assert not zero.any()
    assert zero.shape == scale.shape
    if scale.ndim:
        scale = np.expand_dims(scale, [i for i in range(stored.ndim) if i != node.attrs["axis"]])
    return stored.astype(np.float32) * scale.astype(np.float32)


# Where it quantizes: (graph, shape of w, axis of its output channels, position of w)
PLACES = {
    "matmul": ("(float[B,3,4] x, float[4,6] w) => (float[B,3,6] y) { y = MatMul(x, w) }", (4, 6), 1, 1),
    "matmul, weight left": ("(float[B,4,3] x, float[5,4] w) => (float[B,5,3] y) { y = MatMul(w, x) }", (5, 4), 0, 0),
    "matmul, a weight for each": (
        "(float[2,3,4] x, float[2,4,5] w) => (float[2,3,5] y) { y = MatMul(x, w) }",
        (2, 4, 5),
        2,
        1,
    ),
    "gemm": (
        "(float[B,4] x, float[4,6] w, float[6] b) => (float[B,6] y) { y = Gemm <alpha=0.5, beta=2.0> (x, w, b) }",
        (4, 6),
        1,
        1,
    ),
    "gemm, transB": (
        "(float[B,4] x, float[6,4] w, float[6] b) => (float[B,6] y) { y = Gemm <transB=1> (x, w, b) }",
        (6, 4),
        0,
        1,
    ),
    "gemm, transA": ("(float[4,B] x, float[4,6] w) => (float[B,6] y) { y = Gemm <transA=1> (x, w) }", (4, 6), 1, 1),
    "gemm, weight left": ("(float[4,B] x, float[6,4] w) => (float[6,B] y) { y = Gemm (w, x) }", (6, 4), 0, 0),
    "gemm, weight left, transA": (
        "(float[4,B] x, float[4,6] w) => (float[6,B] y) { y = Gemm <transA=1> (w, x) }",
        (4, 6),
        1,
        0,
    ),
    "conv": (
        "(float[B,2,8,8] x, float[5,2,3,3] w, float[5] b) => (float[B,5,6,6] y) { y = Conv (x, w, b) }",
        (5, 2, 3, 3),
        0,
        1,
    ),
    "conv, depthwise": (
        "(float[B,4,8] x, float[4,1,3] w) => (float[B,4,6] y) { y = Conv <group=4> (x, w) }",
        (4, 1, 3),
        0,
        1,
    ),
    "convtranspose": (
        "(float[B,3,4,4] x, float[3,5,2,2] w) => (float[B,5,8,8] y) { y = ConvTranspose <strides=[2,2]> (x, w) }",
        (3, 5, 2, 2),
        1,
        1,
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_product_multiplies_what_int8_holds_of_its_factors(place, parse, random_feeds):
    text, shape, axis, position = PLACES[place]
    weight = random(*shape)
    graph = with_weights(parse(text), w=weight)
    before = copy_graph(graph)
    feeds = random_feeds(graph)
    amax = float(np.abs(feeds["x"]).max()) / 2
    result = run(graph, Peaks(x=amax), operators=["MatMul", "Gemm", "Conv", "ConvTranspose"])

    (node,) = (n for n in graph.nodes if n.op in {"MatMul", "Gemm", "Conv", "ConvTranspose"})
    assert result.asked == {"y": "int8"}
    assert result.kept == {}
    stored = maker(node, position)
    assert stored.attrs["axis"] == axis
    assert stored.inputs[1].shape == (shape[axis],)
    assert operators(graph) == {**operators(before), "QuantizeLinear": 1, "DequantizeLinear": 2}

    # The float model, given what int8 makes of its factors (QuantizeLinear saturates at -128 and 127), computes the
    # same, up to float32's rounding: 2^-24 a term, up to 18 terms.
    scale = scales(np.asarray(amax), FLOAT32)
    seen = np.clip(np.rint(feeds["x"] / scale), -128, 127) * scale
    before.tensors()["w"].values = dequantized(stored)
    expected = Session(before).run({**feeds, "x": seen.astype(np.float32)})["y"]
    assert np.allclose(Session(graph).run(feeds)["y"], expected, rtol=1e-5, atol=1e-5)
    half_a_step = np.expand_dims(load_values(stored.inputs[1]), [i for i in range(weight.ndim) if i != axis]) / 2
    assert (np.abs(dequantized(stored) - weight) <= half_a_step * (1 + 1e-5)).all()


# What it leaves alone: (graph, constants, parameters, reason)
LEFT = {
    "an activation for a weight": (
        "(float[3,4] x, float[4,5] w) => (float[3,5] y) { y = MatMul(x, w) }",
        {},
        {},
        "it multiplies two activations ('attention: true' quantizes those)",
    ),
    "a convolution whose weight is computed": (
        "(float[1,2,8] x, float[3,2,3] w) => (float[1,3,6] y) { y = Conv(x, w) }",
        {},
        {},
        "its weight is not constant",
    ),
    "a constant convolved": (
        "(float[3,2,3] x, float[1,2,8] w) => (float[1,3,6] y) { y = Conv(w, x) }",
        {"w": (1, 2, 8)},
        {},
        "its weight is not constant",
    ),
    "two constants": (
        "(float[3,4] v, float[4,5] w) => (float[3,5] y) { y = MatMul(v, w) }",
        {"v": (3, 4), "w": (4, 5)},
        {},
        "both its factors are constant: fold-constants makes it one",
    ),
    "a vector": (
        "(float[3,4] x, float[4] w) => (float[3] y) { y = MatMul(x, w) }",
        {"w": (4,)},
        {},
        "its weight is a vector: to quantize it gains nothing",
    ),
    "doubles": (
        "(double[3,4] x, double[4,5] w) => (double[3,5] y) { y = MatMul(x, w) }",
        {"w": np.ones((4, 5))},
        {},
        "its weight is float64; only float32 and float16 are quantized",
    ),
    "integers multiplied": (
        "(int32[3,4] x, int32[4,5] w) => (int32[3,5] y) { y = MatMul(x, w) }",
        {},
        {"attention": True},
        "its factors are int32; only float32 and float16 are quantized",
    ),
    "an operator not asked for": (
        "(float[1,2,4] x, float[2,3,2] w) => (float[1,3,5] y) { y = ConvTranspose(x, w) }",
        {"w": (2, 3, 2)},
        {},
        "ConvTranspose is not among the operators to quantize",
    ),
    "an operator without INT8": (
        '(float[3,4] x, float[4,5] w) => (float[3,5] y) { y = Einsum <equation="ij,jk->ik"> (x, w) }',
        {"w": (4, 5)},
        {},
        "this pass does not quantize Einsum",
    ),
    "what is excluded": (
        "(float[3,4] x, float[4,5] w) => (float[3,5] y) { y = MatMul(x, w) }",
        {"w": (4, 5)},
        {"exclude": ["y"]},
        "excluded by 'y'",
    ),
    "nothing but zeros seen": (
        "(float[3,4] silent, float[4,5] w) => (float[3,5] y) { y = MatMul(silent, w) }",
        {"w": (4, 5)},
        {},
        "its input 'silent' is 0 throughout the calibration data",
    ),
    "quantized before": (
        "(float[3,4] x, float s, int8 z, float[4,5] w) => (float[3,5] y)"
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w) }",
        {"w": (4, 5)},
        {},
        "quantized already",
    ),
    "the body of an If": (
        "(bool c, float[3,4] x, float[4,4] w) => (float[3,4] out) { out = If (c) <"
        "then_branch = t () => (float[3,4] y) { y = MatMul(x, w) },"
        "else_branch = e () => (float[3,4] z) { z = Relu(x) }> }",
        {"w": (4, 4)},
        {},
        "inside a subgraph: its tensors cannot be calibrated",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_it_says_why_a_product_is_left_alone(case, parse):
    text, constants, parameters, reason = LEFT[case]
    values = {name: random(*value) if isinstance(value, tuple) else value for name, value in constants.items()}
    graph = with_weights(parse(text), **values)
    before = digest(graph)

    result = run(graph, Peaks(silent=0.0), **parameters)

    assert result.kept == {"y": reason}
    assert not result.asked
    assert not result.rewrites
    assert result.warnings == ["nothing was quantized; the report says why for each node"]
    assert digest(graph) == before


def test_a_graph_without_products_is_skipped(parse):
    with pytest.raises(Skip, match="the graph has no Conv, ConvTranspose, Gemm, MatMul"):
        run(parse("(float[3] x) => (float[3] y) { y = Relu(x) }"))


def test_products_share_one_pair_and_the_residual_stays_float(parse):
    graph = with_weights(
        parse(
            "(float[3,4] x, float[4,4] wq, float[4,4] wk, float[4,4] wv) => (float[3,4] y)"
            "{ h = Relu(x) q = MatMul(h, wq) k = MatMul(h, wk) v = MatMul(h, wv) s = Sum(q, k, v) y = Add(s, h) }"
        ),
        **{name: random(4, 4) for name in ("wq", "wk", "wv")},
    )
    peaks = Peaks()

    result = run(graph, peaks, calibration=Clipping(method="percentile", percentile=99.0, samples=7))

    assert peaks.asked == [(["h"], "percentile", 99.0, 7)], "one question, each tensor once"
    assert operators(graph) == {
        "Relu": 1, "QuantizeLinear": 1, "DequantizeLinear": 4, "MatMul": 3, "Sum": 1, "Add": 1,
    }  # fmt: skip
    assert len({id(node.inputs[0]) for node in find(graph, "MatMul")}) == 1
    (add,) = find(graph, "Add")
    assert maker(add, 1).op == "Relu"
    assert [rewrite.number for rewrite in result.rewrites] == [1, 2, 3]


def test_a_weight_used_along_two_axes_is_stored_once_for_each(parse, random_feeds):
    graph = with_weights(
        parse(
            "(float[3,4] x, float[4,4] w) => (float[3,4] a, float[3,4] b, float[3,4] c)"
            "{ a = MatMul(x, w) b = Gemm <transB=1> (x, w) c = MatMul(a, w) }"
        ),
        w=random(4, 4),
    )
    feeds = random_feeds(graph)
    before = Session(graph).run(feeds)

    run(graph, Peaks(x=float(np.abs(feeds["x"]).max()), a=float(np.abs(before["a"]).max())))

    first, second, third = (
        maker(node, 1) for node in [*find(graph, "MatMul")[:1], *find(graph, "Gemm"), find(graph, "MatMul")[1]]
    )
    assert first is third
    assert (first.attrs["axis"], second.attrs["axis"]) == (1, 0)
    after = Session(graph).run(feeds)
    for name, value in before.items():
        # Each factor is off by at most half of 1/127 of its range: 1 % of the range of a product of four terms.
        assert np.allclose(after[name], value, atol=0.03 * np.abs(value).max())


@pytest.mark.parametrize(
    "way", ["t = Transpose <perm=[1,0]> (e)", "t = Transpose (e)", "u = Identity(e) t = Transpose (u)"]
)
def test_a_tied_weight_is_quantized_transposed_and_the_embedding_stays(way, parse):
    table = random(10, 4)
    graph = with_weights(
        parse(f"(int64[N] i, float[10,4] e) => (float[N,10] y) {{ x = Gather(e, i) {way} y = MatMul(x, t) }}"),
        e=table,
    )
    run(graph, Peaks(x=float(np.abs(table).max())))

    assert operators(graph) == {"Gather": 1, "QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1}
    stored = maker(find(graph, "MatMul")[0], 1)
    assert stored.attrs["axis"] == 1
    assert np.allclose(dequantized(stored), table.T, atol=np.abs(table).max() / 127 / 2 * 1.001)  # half a step
    (gather,) = find(graph, "Gather")
    assert gather.inputs[0].values is table


def test_reshape_and_cast_of_a_weight_are_read_through(parse):
    graph = parse(
        "(float16[3,4] x, float[24] w) => (float16[3,6] y)"
        "<int64[2] s = {4, -1}> { h = Cast <to=10> (w) r = Reshape(h, s) y = MatMul(x, r) }"
    )
    weight = random(24)
    result = run(with_weights(graph, w=weight))

    assert result.asked == {"y": "int8"}
    assert operators(graph) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1}
    stored = maker(find(graph, "MatMul")[0], 1)
    assert stored.inputs[1].dtype == np.float16
    assert np.allclose(dequantized(stored), weight.reshape(4, 6), atol=np.abs(weight).max() / 127)


def test_a_transposed_weight_that_is_an_output_too_stays_one(parse, random_feeds):
    graph = with_weights(
        parse("(float[3,4] x, float[5,4] w) => (float[3,5] y, float[4,5] t) { t = Transpose(w) y = MatMul(x, t) }"),
        w=random(5, 4),
    )
    before = Session(graph).run(random_feeds(graph))["t"]
    run(graph)
    assert np.array_equal(Session(graph).run(random_feeds(graph))["t"], before)


def test_later_changes_of_the_float_weight_leave_the_int8_one_alone(parse):
    weight = random(4, 6)
    graph = with_weights(
        parse("(float[3,4] x, float[4,6] w) => (float[3,6] y, float[4,6] v) { y = MatMul(x, w) v = Relu(w) }"),
        w=weight,
    )
    run(graph)
    (relu,) = find(graph, "Relu")
    relu.inputs[0].values = np.zeros_like(weight)
    stored = maker(find(graph, "MatMul")[0], 1)
    assert np.abs(dequantized(stored) - weight).max() < np.abs(weight).max() / 127


def test_float16_graphs_are_quantized_in_float16(parse, random_feeds):
    text = "(float16[B,4] x, float16[4,6] w) => (float16[B,6] y) { y = MatMul(x, w) }"
    graph = with_weights(parse(text, opset=17), w=random(4, 6).astype(np.float16))
    feeds = random_feeds(graph)
    before = Session(graph).run(feeds)["y"]

    run(graph, Peaks(x=float(np.abs(feeds["x"]).max())))

    assert graph.opset == 19, "QuantizeLinear takes float16 from opset 19"
    assert {t.dtype for node in find(graph, "DequantizeLinear") for t in node.inputs[1:2]} == {np.dtype(np.float16)}
    after = Session(graph).run(feeds)["y"]
    # Half a step of each factor, 1/254 of its range, over the four terms of a product.
    assert np.abs(after.astype(np.float32) - before).max() < 0.03 * np.abs(before).max()


def test_old_opsets_are_raised_to_per_axis_quantization(parse, random_feeds):
    graph = with_weights(
        parse("(float[3,4] x, float[4,6] w) => (float[3,6] y) { y = MatMul(x, w) }", 11), w=random(4, 6)
    )
    run(graph)
    assert graph.opset == 13
    Session(graph).run(random_feeds(graph))


def test_attention_products_are_quantized_on_request(parse, random_feeds):
    graph = parse("(float[2,3,4] q, float[2,4,3] k) => (float[2,3,3] y) { s = Identity(q) y = MatMul(s, k) }")
    feeds = random_feeds(graph)
    before = Session(graph).run(feeds)["y"]
    peaks = Peaks(s=float(np.abs(feeds["q"]).max()), k=float(np.abs(feeds["k"]).max()))

    result = run(graph, peaks, attention=True)

    assert result.asked == {"y": "int8"}
    assert operators(graph) == {"Identity": 1, "QuantizeLinear": 2, "DequantizeLinear": 2, "MatMul": 1}
    after = Session(graph).run(feeds)["y"]
    assert np.abs(after - before).max() < 0.03 * np.abs(before).max()  # half a step of each factor, four terms


def two_layers(parse) -> Graph:
    graph = with_weights(
        parse("(float[3,4] x, float[4,4] a, float[4,4] b) => (float[3,4] y) { h = MatMul(x, a) y = MatMul(h, b) }"),
        a=random(4, 4),
        b=random(4, 4),
    )
    for node, module in zip(graph.nodes, ("encoder.0.dense", "encoder.1.dense"), strict=True):
        metadata(node)["pkg.torch.onnx.name_scopes"] = str(["", "encoder", module, f"linear_{module[8]}"])
        node.name = f"node_{module[8]}"
    return graph


@pytest.mark.parametrize(
    ("parameters", "asked"),
    [
        ({"include": ["node_0"]}, {"node_0"}),
        ({"include": ["encoder.1.*"]}, {"node_1"}),
        ({"exclude": ["encoder.?.dense"]}, set()),
        ({"include": ["node_*"], "exclude": ["encoder.0*"]}, {"node_1"}),
    ],
)
def test_patterns_match_names_and_module_paths(parameters, asked, parse):
    graph = two_layers(parse)
    result = run(graph, **parameters)
    assert set(result.asked) == asked
    assert set(result.kept) == {"node_0", "node_1"} - asked


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(kind, parse):
    with pytest.raises(LlmcError, match=rf"{kind} pattern 'encoder.0.dens' matches no .* nearest: 'encoder.0.dense'"):
        run(two_layers(parse), **{kind: ["encoder.0.dens"]})


def test_new_nodes_belong_to_the_module_that_they_serve(parse):
    graph = two_layers(parse)
    result = run(graph)
    assert [rewrite.module for rewrite in result.rewrites] == ["encoder.0.dense", "encoder.1.dense"]
    assert [module_of(node) for node in find(graph, "QuantizeLinear")] == ["encoder.0.dense", "encoder.1.dense"]
    assert result.rewrites[0].detail == "'x' clips at 4; 'a' per channel on axis 1"


def test_a_run_ends_after_the_rewrite_that_it_is_told(parse):
    graph = two_layers(parse)
    result = run(graph, stop_after=1)
    assert list(result.asked) == ["node_0"]
    assert result.warnings == []
    assert [maker(node, 1).op if node.inputs[1].inputs else "" for node in find(graph, "MatMul")] == [
        "DequantizeLinear",
        "",
    ]


def test_names_that_the_graph_has_already_are_not_taken_again(parse):
    graph = with_weights(
        parse(
            "(float[3,4] x, float[4,4] w) => (float[3,4] y)"
            "{ x_int8 = Relu(x) w_scale = MatMul(x, w) y = Add(x_int8, w_scale) }"
        ),
        w=random(4, 4),
    )
    run(graph)
    made = [tensor.name for node in graph.nodes for tensor in node.outputs]
    assert len(made) == len(set(made))
    assert len(graph.tensors()) == len({id(t) for n in graph.nodes for t in (*n.inputs, *n.outputs) if t.name})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_an_error(bad, parse):
    weight = random(4, 6)
    weight[1, 2] = bad
    graph = with_weights(parse("(float[3,4] x, float[4,6] w) => (float[3,6] y) { y = MatMul(x, w) }"), w=weight)
    with pytest.raises(LlmcError, match="weight 'w' of y has NaN or infinity"):
        run(graph)


def test_it_asks_for_calibration_data_where_there_is_none(parse):
    graph = two_layers(parse)
    with pytest.raises(LlmcError, match="--calibration DATA"):
        QuantizeInt8().run(graph, Context())


def test_two_runs_give_the_same_graph(parse):
    graph = two_layers(parse)
    twin = copy_graph(graph)
    run(graph)
    run(twin)
    assert digest(graph) == digest(twin)


# Bias correction

BIASED = {
    "matmul and add": "(float[N,6] x, float[6,5] w, float[5] b) => (float[N,5] y) { m = MatMul(x, w) y = Add(b, m) }",
    "matmul alone": "(float[N,6] x, float[6,5] w) => (float[N,5] y) { y = MatMul(x, w) }",
    "matmul, read twice": "(float[N,6] x, float[6,5] w, float[5] b) => (float[N,5] y, float[N,5] r)"
    "{ y = MatMul(x, w) a = Add(y, b) r = Relu(a) }",
    "gemm": "(float[N,6] x, float[6,5] w, float[5] b) => (float[N,5] y) { y = Gemm <beta=0.5> (x, w, b) }",
    "gemm without bias": "(float[N,6] x, float[6,5] w) => (float[N,5] y) { y = Gemm <beta=0.5> (x, w) }",
    "conv": "(float[N,6,4,4] x, float[5,6,3,3] w, float[5] b) => (float[N,5,2,2] y) { y = Conv(x, w, b) }",
    "conv without bias": "(float[N,6,4,4] x, float[5,6,3,3] w) => (float[N,5,2,2] y) { y = Conv(x, w) }",
}


@pytest.mark.parametrize("case", BIASED)
def test_no_channel_is_off_on_average(case, parse):
    graph = parse(BIASED[case])
    rng = np.random.default_rng(1)
    shapes = {tensor.name: tensor.shape for tensor in graph.inputs}
    given = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items() if n != "x"}
    graph = with_weights(graph, **given)
    # far from 0, and rounded alike each time: what a bias can make up for
    sample = {"x": (5 + 0.01 * rng.standard_normal((64, *shapes["x"][1:]))).astype(np.float32)}
    exact = Session(graph).run(sample)["y"]
    off = {}
    for corrected in (False, True):
        rounded = copy_graph(graph)
        QuantizeInt8(correct_bias=corrected).run(rounded, Context(Ledger(), SampledActivations([sample])))
        onnx.checker.check_model(to_model(rounded), full_check=True)
        difference = Session(rounded).run(sample)["y"] - exact
        off[corrected] = np.abs(difference.mean(axis=tuple(i for i in range(difference.ndim) if i != 1)))
    assert off[False].max() > 1e-2
    assert off[True].max() < 1e-4, "a few roundings of float32 at a magnitude of 50"


def test_a_product_with_a_bias_that_is_computed_keeps_it(parse):
    text = "(float[N,6] x, float[N,5] b, float[6,5] w) => (float[N,5] y) { y = Gemm(x, w, b) }"
    graph = with_weights(parse(text), w=random(6, 5))
    sample = {"x": random(4, 6), "b": random(4, 5)}
    QuantizeInt8().run(graph, Context(Ledger(), SampledActivations([sample])))
    assert find(graph, "Gemm")[0].inputs[2].name == "b"


# Numbers

FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
MAGNITUDES = st.floats(0, 2.0**40, width=32)


@settings(deadline=None)
@given(MAGNITUDES)
@example(2.0**-149)
def test_a_scale_covers_the_range_and_wastes_little_of_it(amax):
    scale = float(scales(np.asarray(amax), FLOAT32))
    if amax == 0:
        assert scale == 1
    else:
        # float16 is at most 2^-7 coarse where it is used; float32 rounds to nearest, by 2^-24.
        # No scale is subnormal: TensorRT refuses 0.
        assert amax * (1 - 2**-23) <= scale * 127 <= max(amax * (1 + 2**-7) * (1 + 2**-23), 127 * 2.0**-126)


@settings(deadline=None)
@given(st.floats(2.0**-24, 60000, width=32))
def test_scales_of_float32_are_float16_values_where_that_is_fine_enough(amax):
    wide, half = scales(np.asarray(amax), FLOAT32), scales(np.asarray(amax), FLOAT16)
    assert half > 0
    assert float(half) * 127 >= amax
    if amax / 127 >= 2**-17:
        assert float(wide) == float(half), "convert-fp16 must not move the grid"


def test_a_channel_of_zeros_gets_scale_1():
    assert scales(np.array([0.0, 127.0]), FLOAT32).tolist() == [1.0, 1.0]


@settings(deadline=None)
@given(npst.arrays(np.float32, (3, 5), elements=st.floats(-1000, 1000, width=32)))
def test_a_weight_moves_by_at_most_half_its_scale(weight):
    scale = scales(np.abs(weight).max(axis=1), FLOAT32)[:, None]
    levels = quantize(weight, scale)
    assert np.abs(levels.astype(np.int16)).max(initial=0) <= 127
    # Relative 2^-22: the division and the product each round in float32.
    assert (np.abs(levels * scale - weight) <= scale / 2 + np.abs(weight) * 2.0**-22).all()
