from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, LlmcError, PassResult, Skip
from llmc.passes.graph import Array, Constant, Graph, copy_graph, to_model
from llmc.passes.precision.calibration import Calibration, Clipping
from llmc.passes.precision.quantize_dynamic import QuantizeDynamic
from llmc.passes.precision.quantize_int8 import QuantizeInt8
from llmc.passes.precision.search_precision import SearchPrecision
from llmc.passes.precision.smooth_quant import SmoothQuant

K = 16
LOUD = np.ones(K, np.float32)
LOUD[3] = 60
"""One channel is far larger than the others, as in transformers."""


def with_weights(graph: Graph, seed: int = 0, **given: Array) -> Graph:
    """Inputs in upper case become constants; a loud channel meets small weights, so that no product is all of it."""
    rng = np.random.default_rng(seed)
    for tensor in list(graph.inputs):
        if tensor.name.isupper():
            values = rng.standard_normal(tensor.shape).astype(np.float32)
            if tensor.name in "VW":
                values[tuple(3 if size == K else slice(None) for size in tensor.shape)] /= LOUD[3]
            tensor.to_constant(given.get(tensor.name, values))
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    return graph


def samples(seed: int = 0, count: int = 8, offset: float = 0.0) -> list[dict[str, Array]]:
    rng = np.random.default_rng([seed, 1])
    return [{"x": ((rng.standard_normal((1, 20, K)) + offset) * LOUD).astype(np.float32)} for _ in range(count)]


def run(graph: Graph, data: list[dict[str, Array]], stop_after: int | None = None, **parameters) -> PassResult:
    return SmoothQuant(**parameters).run(graph, Context(Ledger(stop_after), SampledActivations(data)))


def outputs(graph: Graph, data: list[dict[str, Array]]) -> Array:
    session = Session(graph)
    return np.concatenate([value.reshape(-1) for sample in data for value in session.run(sample).values()])


def operators(graph: Graph) -> dict[str, int]:
    return dict(Counter(node.op for node in graph.nodes))


# graph text, operators that smoothing adds with a shift, and without
FIRES = {
    "matmul": ("(float[N,S,16] x, float[16,8] W) => (float[N,S,8] y) { y = MatMul(x, W) }", "Mul Sub Add", "Mul"),
    "matmul with bias": (
        "(float[N,S,16] x, float[16,8] W, float[8] B) => (float[N,S,8] y) { m = MatMul(x, W) y = Add(m, B) }",
        "Mul Sub",
        "Mul",
    ),
    "gemm, transposed": (
        "(float[N,S,16] x, float[8,16] W, float[8] B) => (float[M,8] y)"
        "<int64[2] f = {-1, 16}> { r = Reshape(x, f) y = Gemm <transB=1, beta=0.5> (r, W, B) }",
        "Mul Sub",
        "Mul",
    ),
    "two products of one activation": (
        "(float[N,S,16] x, float[16,8] W, float[16,4] V) => (float[N,S,8] y, float[N,S,4] z)"
        "{ h = Neg(x) y = MatMul(h, W) z = MatMul(h, V) }",
        "Mul Sub Add Add",
        "Mul",
    ),
    "after a normalisation of its own": (
        "(float[N,S,16] x, float[16] G, float[16] C, float[16,8] W, float[8] B) => (float[N,S,8] y)"
        "{ h = LayerNormalization <axis=-1> (x, G, C) m = MatMul(h, W) y = Add(m, B) }",
        "Sub",
        "",
    ),
    "after a normalisation with a residual": (
        "(float[N,S,16] x, float[16] G, float[16] C, float[16,16] W) => (float[N,S,16] y)"
        "{ h = LayerNormalization <axis=-1> (x, G, C) m = MatMul(h, W) y = Add(m, h) }",
        "Mul Sub Add",
        "Mul",
    ),
}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("case", FIRES)
def test_float_results_stay_and_int8_results_come_nearer(case, shift, parse):
    text, shifted, scaled = FIRES[case]
    weights = {"G": LOUD} if "float[16] G" in text else {}
    graph = with_weights(parse(text), **weights)
    data = samples(offset=1.0)
    if weights:
        data = [{"x": sample["x"] / LOUD} for sample in data]
    exact, before = outputs(graph, data), Counter(operators(graph))
    plain = copy_graph(graph)

    result = run(graph, data, shift=shift)

    assert [rewrite.rule for rewrite in result.rewrites] == ["SmoothQuant"], result.near_misses
    assert Counter(operators(graph)) - before == Counter((shifted if shift else scaled).split())
    onnx.checker.check_model(to_model(graph), full_check=True)
    # the bound of the class's Safety
    assert np.abs(outputs(graph, data) - exact).max() <= 1e-5 * np.abs(exact).max()
    errors = []
    for candidate in (plain, graph):
        step = QuantizeInt8(calibration=Clipping(method="minmax"))
        step.run(candidate, Context(Ledger(), SampledActivations(data)))
        errors.append(float(np.linalg.norm(outputs(candidate, data) - exact)))
    assert errors[1] < 0.6 * errors[0]


@settings(max_examples=15, deadline=None)
@given(
    spread=st.floats(0, 3), offset=st.floats(-4, 4), alpha=st.one_of(st.none(), st.floats(0, 1)), shift=st.booleans()
)
def test_smoothing_is_exact_in_float32(parse, spread, offset, alpha, shift):
    graph = with_weights(parse(FIRES["matmul with bias"][0]))
    rng = np.random.default_rng(0)
    channels = np.exp(spread * rng.standard_normal(K)) * np.sign(rng.standard_normal(K))
    data = [{"x": ((rng.standard_normal((1, 9, K)) + offset) * channels).astype(np.float32)} for _ in range(3)]
    exact = outputs(graph, data)
    run(graph, data, alpha=alpha, shift=shift)
    # float32: the products are summed in another order, with terms no larger than the largest results times K
    assert np.abs(outputs(graph, data) - exact).max() <= 1e-5 * max(np.abs(s["x"]).max() for s in data)


def test_a_shift_pays_for_channels_on_one_side_of_zero(parse):
    graph = with_weights(parse(FIRES["matmul with bias"][0]))
    data = samples(offset=5.0)
    errors = []
    for shift in (False, True):
        candidate = copy_graph(graph)
        run(candidate, data, shift=shift)
        exact = outputs(candidate, data)
        QuantizeInt8().run(candidate, Context(Ledger(), SampledActivations(data)))
        errors.append(float(np.linalg.norm(outputs(candidate, data) - exact)))
    assert errors[1] < 0.7 * errors[0], "the channels take about 4 of their 8 units"


def test_a_channel_that_is_quiet_on_the_data_does_not_clip_on_other_data(parse):
    graph = with_weights(parse(FIRES["matmul with bias"][0]))
    quiet, loud = samples(), samples(seed=1)
    for sample in quiet:
        sample["x"][..., 5] *= 1e-3
    exact, errors = outputs(graph, loud), []
    for smoothed in (False, True):
        candidate = copy_graph(graph)
        if smoothed:
            run(candidate, quiet)
        step = QuantizeInt8(calibration=Clipping(method="minmax"))
        step.run(candidate, Context(Ledger(), SampledActivations(quiet)))
        errors.append(float(np.linalg.norm(outputs(candidate, loud) - exact)))
    assert errors[1] < 0.6 * errors[0], "as on data on which no channel is quiet"


FROM_STATISTICS = '{"calibration": {"statistics": "calibration.json"}}'


@pytest.mark.parametrize(
    ("step", "refused"),
    [
        (QuantizeDynamic(), True),
        (QuantizeInt8(correct_bias=False), True),
        (QuantizeInt8.model_validate_json(FROM_STATISTICS), True),
        (SearchPrecision.model_validate_json(FROM_STATISTICS), True),
        (QuantizeInt8(), False),
        (SearchPrecision(), False),
    ],
)
def test_without_bias_correction_a_shift_is_refused(step, refused):
    reason = "what 'shift' moves makes errors that only bias correction takes back: leave shift out"
    assert step.conflict(SmoothQuant(shift=True)) == (reason if refused else None)
    assert step.conflict(SmoothQuant()) is None
    assert step.conflict(QuantizeInt8()) is None


def test_a_recipe_that_needs_the_correction_and_has_none_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("passes:\n  - smooth-quant: {shift: true}\n  - quantize-dynamic\n", encoding="utf-8")
    with pytest.raises(
        LlmcError, match=r"r.yaml:3: passes.2: quantize-dynamic must not stand after smooth-quant \(line 2\)"
    ):
        Recipe.load(path)


def test_values_take_the_division_through_attention(parse):
    text = (
        "(float[N,S,16] x, float[16,48] W, float[48] B, float[16,8] V) => (float[N,S,8] y) <int64[3] s = {16, 16, 16}>"
        "{ p = MatMul(x, W) a = Add(p, B) q, k, v = Split <axis=-1> (a, s)"
        "h = Attention <q_num_heads=2, kv_num_heads=2> (q, k, v) y = MatMul(h, V) }"
    )
    weight = np.random.default_rng(0).standard_normal((16, 48)).astype(np.float32) / 8
    weight[:, 40] *= 60
    graph = with_weights(parse(text, opset=23), W=weight)
    data = [{"x": sample["x"] / LOUD} for sample in samples()]
    exact, before = outputs(graph, data), operators(graph)
    result = run(graph, data, include=["last"])
    assert "in the constants before it" in result.rewrites[0].detail
    assert operators(graph) == before
    assert np.abs(outputs(graph, data) - exact).max() <= 1e-5 * np.abs(exact).max()


LEAVES_ALONE = {
    "even channels": (
        "(float[N,S,16] x, float[16,8] W) => (float[N,S,8] y) { y = MatMul(x, W) }",
        {},
        samples,
        "smoothing 'x' would bring",
    ),
    "no Mul wanted": (
        "(float[N,S,16] x, float[16,8] W) => (float[N,S,8] y) { y = MatMul(x, W) }",
        {"insert_mul": False},
        samples,
        "'x' is no node's result; 'insert_mul' would divide it",
    ),
    "a weight on the left": (
        "(float[N,S,16] x, float[5,S] W) => (float[N,5,16] y) { y = MatMul(W, x) }",
        {},
        samples,
        "it sums over another axis of its activation than the last",
    ),
    "many matrices": (
        "(float[N,S,16] x, float[1,16,8] W) => (float[N,S,8] y) { y = MatMul(x, W) }",
        {},
        samples,
        "its weight is more than one matrix",
    ),
    "excluded": (
        "(float[N,S,16] x, float[16,8] W) => (float[N,S,8] y) { y = MatMul(x, W) }",
        {"exclude": ["MatMul"]},
        samples,
        "excluded by 'MatMul'",
    ),
}


@pytest.mark.parametrize("case", LEAVES_ALONE)
def test_it_says_why_an_activation_is_left_alone(case, parse):
    text, parameters, make, reason = LEAVES_ALONE[case]
    graph = with_weights(parse(text.replace("float[5,S] W", "float[5,20] W").replace("N,S,16] x", "N,20,16] x")))
    data = make()
    if case == "even channels":
        data = [{"x": sample["x"] / LOUD} for sample in data]
    before = operators(graph)
    try:
        result = run(graph, data, **parameters)
    except Skip:
        result = PassResult()
        SmoothQuant(**parameters)._groups(graph, result)
    assert result.rewrites == []
    assert operators(graph) == before
    assert any(reason in miss.reason for miss in result.near_misses), result.near_misses


def test_a_graph_without_weights_is_skipped(parse):
    with pytest.raises(Skip, match="no MatMul or Gemm multiplies an activation by a constant weight"):
        run(parse("(float[3] x) => (float[3] y) { y = Relu(x) }"), [])


def test_it_needs_calibration_data(parse):
    with pytest.raises(LlmcError, match="--calibration DATA"):
        SmoothQuant().run(with_weights(parse(FIRES["matmul"][0])), Context())


def test_a_run_ends_after_the_rewrite_that_it_is_told(parse):
    graph = with_weights(parse(FIRES["matmul"][0]))
    before = operators(graph)
    assert run(graph, samples(), stop_after=0).rewrites == []
    assert operators(graph) == before


def test_only_the_samples_asked_for_are_used(parse):
    data = samples()
    graphs = [with_weights(parse(FIRES["matmul"][0])) for _ in range(2)]
    details = [
        run(graph, given, calibration=Calibration(samples=4)).rewrites[0].detail
        for graph, given in zip(graphs, (data, data[:4]), strict=True)
    ]
    assert details[0] == details[1]


def test_smoothing_depends_neither_on_batches_nor_on_order(parse):
    data = samples()
    whole = [{"x": np.concatenate([sample["x"] for sample in data])}]
    graphs = []
    for batches in (data, data[::-1], whole):
        graph = with_weights(
            parse("(float[N,S,16] x, float[16,8] W) => (float[N,S,8] y) { h = Neg(x) y = MatMul(h, W) }")
        )
        run(graph, batches, shift=True)
        graphs.append([c.values for c in graph.tensors().values() if isinstance(c, Constant)])
    for other in graphs[1:]:
        for first, second in zip(graphs[0], other, strict=True):
            assert np.array_equal(first, second)
