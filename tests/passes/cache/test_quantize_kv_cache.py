from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.errors import LlmcError
from llmc.compiler.session import Session
from llmc.compiler.targets import BuildRequest, Range
from llmc.compiler.targets.tensorrt import TensorRT
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.base import Context, Ledger, PassResult, Skip
from llmc.passes.cache.int8_cache import Int8Cache, quantized
from llmc.passes.cache.quantize_kv_cache import QuantizeKvCache
from llmc.passes.graph import Array, Graph, copy_graph, infer_shapes, save_model, to_model
from llmc.passes.precision.calibration import Calibration

BATCH, PAST, NEW, LENGTH = 2, 3, 2, 7
TOLERANCE = 1e-5
"""float32: sums of a few products of order 1, 2^-24 each, seen through a Softmax."""
WIDTHS = np.array([[1, 8, 0.5, 2], [0.25, 3, 40, 1]], np.float32)
"""How wide each channel of each head is, [2, 4]."""

Q = "float[B,4,S,4] q"
NEW_ONES = f"{Q}, float[B,2,S,4] n, float[B,2,S,4] nv"
GROWING = f"{NEW_ONES}, float[B,2,P,4] pk, float[B,2,P,4] pv"
STATIC = f"{NEW_ONES}, float[B,2,{LENGTH},4] pk, float[B,2,{LENGTH},4] pv"
OUTPUTS = "float[B,4,S,4] y, float[B,2,N,4] k, float[B,2,N,4] v"
FIXED = OUTPUTS.replace("N", str(LENGTH))
JOIN = "k = Concat<axis = 2>(pk, n) v = Concat<axis = -2>(pv, nv)"
WRITE = "k = TensorScatter<axis = 2>(pk, n, at) v = TensorScatter(pv, nv, at)"
ATTEND = "y = Attention(q, k, v)"
SPELLED = "kk = Concat<axis = 1>(k, k) vv = Concat<axis = 1>(v, v) t = Transpose<perm = [0, 1, 3, 2]>(kk) "
SPELLED += "qk = MatMul(q, t) w = Softmax(qk) y = MatMul(w, vv)"

QDQ = {"QuantizeLinear": 2, "DequantizeLinear": 2}
KEYS = {**QDQ, "Div": 1, "Mul": 1}
APART = {**KEYS, "Concat": 2}
PLACES = {"Shape": 2, "Squeeze": 1, "Range": 1, "Unsqueeze": 1, "Expand": 1}
FIRES = {
    "keys and values are joined": (GROWING, OUTPUTS, f"{JOIN} {ATTEND}", KEYS),
    "with a mask": (f"{GROWING}, bool[S,P + S] m", OUTPUTS, f"{JOIN} y = Attention(q, k, v, m)", KEYS),
    "a cache inside of the operator": (GROWING, OUTPUTS, "y, k, v = Attention(q, n, nv, , pk, pv)", APART),
    "a cache inside of a causal operator": (
        GROWING, OUTPUTS, "y, k, v = Attention<is_causal = 1>(q, n, nv, , pk, pv)",
        {**APART, "Shape": 3, "Squeeze": 3, "Add": 2, "Range": 2, "Unsqueeze": 1, "LessOrEqual": 1},
    ),
    "a cache inside of a causal operator, with a mask": (
        f"{GROWING}, bool[S,P + S] m", OUTPUTS, "y, k, v = Attention<is_causal = 1>(q, n, nv, m, pk, pv)",
        {**APART, "Shape": 3, "Squeeze": 3, "Add": 2, "Range": 2, "Unsqueeze": 1, "LessOrEqual": 1, "And": 1},
    ),
    "a cache inside of a causal operator, with numbers added": (
        f"{GROWING}, float[S,P + S] m", OUTPUTS, "y, k, v = Attention<is_causal = 1>(q, n, nv, m, pk, pv)",
        {**APART, "Shape": 3, "Squeeze": 3, "Add": 2, "Range": 2, "Unsqueeze": 1, "LessOrEqual": 1, "Where": 1},
    ),
    "static caches, each sequence at a place of its own": (
        f"{STATIC}, int64[B] at", FIXED, f"{WRITE} {ATTEND}",
        {**KEYS, **PLACES, "Unsqueeze": 2, "Add": 1, "TensorScatter": -2, "ScatterElements": 2},
    ),
    "static caches that begin anew": (
        STATIC, FIXED, f"{WRITE.replace(', at', '')} {ATTEND}",
        {**KEYS, **PLACES, "TensorScatter": -2, "ScatterElements": 2},
    ),
    "attention is spelled out, and nothing says which are keys": (GROWING, OUTPUTS, f"{JOIN} {SPELLED}", QDQ),
    "attention is spelled out, and the name says which are keys": (
        GROWING.replace("pk", "past_key"), OUTPUTS, f"{JOIN.replace('pk', 'past_key')} {SPELLED}", KEYS,
    ),
    "two layers read the same keys": (
        GROWING, f"{OUTPUTS}, float[B,4,S,4] z", f"{JOIN} {ATTEND} q2 = Neg(q) z = Attention(q2, k, v)",
        {**KEYS, "Mul": 2},
    ),
    "keys that are values, too": (
        GROWING, f"{OUTPUTS}, float[B,4,S,4] z", f"{JOIN} {ATTEND} z = Attention(q, k, k)", QDQ,
    ),
    "what reads the size of the cache": (
        GROWING, f"{OUTPUTS}, int64[4] size, int64[4] before", f"{JOIN} {ATTEND} size = Shape(k) before = Shape(pk)",
        KEYS,
    ),
}  # fmt: skip
"""Inputs, outputs, nodes, and how many of each operator come."""
LEAVES_ALONE = {
    "something else reads the cache as it was": (
        GROWING, f"{OUTPUTS}, float[B,2,P,4] m", f"{JOIN} {ATTEND} [neg] m = Neg(pk)",
        "the cache 'pk' goes to Neg 'neg', too",
    ),
    "the cache is the new tokens, too": (
        GROWING, OUTPUTS, f"[join] k = Concat<axis = 2>(pk, pk) v = Concat<axis = 2>(pv, pv) {ATTEND}",
        "Concat 'join' reads the cache 'pk' twice",
    ),
    "float64": (
        GROWING.replace("float[", "double["), OUTPUTS.replace("float[", "double["), f"{JOIN} {ATTEND}",
        "the cache 'pk' is float64, not float32 or float16",
    ),
    "an unknown number of heads": (
        GROWING.replace("float[B,2,P,4] pk", "float[B,H,P,4] pk"), OUTPUTS, f"{JOIN} {ATTEND}",
        "number and size of the heads of 'pk' are not known",
    ),
    "a ring": (
        f"{STATIC}, int64[B] at", FIXED,
        f"[ring] k = TensorScatter<axis = 2, mode = \"circular\">(pk, n, at) v = TensorScatter(pv, nv, at) {ATTEND}",
        "TensorScatter 'ring' begins again at the first token where its cache is full",
    ),
    "a cache that is written along another axis": (
        f"{STATIC}, float[B,2,{LENGTH},1] column, int64[B] at", FIXED,
        f"[write] k = TensorScatter<axis = 3>(pk, column) v = TensorScatter(pv, nv, at) {ATTEND}",
        "TensorScatter 'write' writes along axis 3, not along the tokens",
    ),
    "Attention without heads of their own": (
        "float[B,S,16] q, float[B,S,8] n, float[B,S,8] nv, float[B,2,P,4] pk, float[B,2,P,4] pv",
        OUTPUTS.replace("[B,4,S,4] y", "[B,S,16] y"),
        "[att] y, k, v = Attention<q_num_heads = 4, kv_num_heads = 2>(q, n, nv, , pk, pv)",
        "'n' is not known to be [batch, heads, tokens, size]",
    ),
    "Attention that gives back its scores": (
        GROWING, f"{OUTPUTS}, float[B,4,S,N] s", "[att] y, k, v, s = Attention(q, n, nv, , pk, pv)",
        "Attention 'att' has lengths of its own, or gives back its scores",
    ),
}  # fmt: skip


def build(parse: Any, inputs: str, outputs: str, body: str) -> Graph:
    """`P + S` is no name in ONNX text."""
    graph: Graph = parse(f"({inputs.replace('P + S', 'PS')}) => ({outputs}) {{ {body} }}", opset=24)
    for tensor in graph.inputs:
        tensor.shape = ["P + S" if size == "PS" else size for size in tensor.shape]
    infer_shapes(graph)
    return graph


def feeds(graph: Graph, seed: int, past: int = PAST, new: int = NEW) -> dict[str, Array]:
    """Random inputs; of what is cached each channel as wide as WIDTHS has it."""
    rng, sizes = np.random.default_rng(seed), {"B": BATCH, "S": new, "P": past, "P + S": past + new}
    made: dict[str, Array] = {}
    for tensor in graph.inputs:
        shape = [size if isinstance(size, int) else sizes.get(size, 2) for size in tensor.shape]
        if tensor.name == "at":
            made[tensor.name] = np.arange(past, past + BATCH)
        elif tensor.dtype == np.bool_:
            made[tensor.name] = rng.random(shape) < 0.7
            made[tensor.name][:, 0] = True  # each token sees one: no row is all -inf
        else:
            values = rng.uniform(-1, 1, shape).astype(tensor.dtype)
            made[tensor.name] = values * WIDTHS[:, None, :] if shape[1:2] == [2] and shape[-1] == 4 else values
    return made


def int8(graph: Graph, calibrated: list[dict[str, Array]], **kwargs: Any) -> tuple[Graph, PassResult]:
    changed = copy_graph(graph)
    result = QuantizeKvCache(**kwargs).run(changed, Context(activations=SampledActivations(calibrated)))
    assert result.near_misses == []
    onnx.checker.check_model(to_model(changed), full_check=True)
    return changed, result


def on_grid(cache: Int8Cache, given: dict[str, Array]) -> dict[str, Array]:
    """Inputs of the float graph in which all that is cached is what its levels stand for: NumPy's rounding."""
    keys = next(name for name in cache.caches if name.endswith(("pk", "key")))
    scales = {"n": cache.scale(keys), "nv": cache.scale("pv"), keys: cache.scale(keys), "pv": cache.scale("pv")}
    return {
        name: (np.clip(np.rint(value / scales[name]), -128, 127) * scales[name]).astype(value.dtype)
        if name in scales
        else value
        for name, value in given.items()
    }


@pytest.mark.parametrize("case", FIRES)
def test_it_computes_with_keys_and_values_on_the_levels(parse: Any, case: str) -> None:
    """What the float graph makes of keys and values that NumPy has rounded."""
    inputs, outputs, body, come = FIRES[case]
    graph = build(parse, inputs, outputs, body)
    calibrated = [feeds(graph, seed) for seed in (1, 2)]
    changed, result = int8(graph, calibrated)
    assert len(result.rewrites) in (1, 2)
    before, after = (Counter(node.op for node in g.nodes) for g in (graph, changed))
    assert {op: after[op] - before[op] for op in (*after, *before) if after[op] != before[op]} == come
    held = [t for t in (*changed.inputs, *changed.outputs) if t.dtype == np.int8]
    assert [t.name for t in held] == [t.name for t in (*graph.inputs[3:5], *graph.outputs[1:3])]
    cache = Int8Cache.of(changed)
    assert cache is not None
    for past, new in ((PAST, NEW), (0, NEW), (PAST, 1)):
        given = feeds(graph, 3, past, new)
        found, expected = Session(changed).run(given), Session(graph).run(on_grid(cache, given))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # caches: what 127 levels of the widest channel, 40, are rounded to in float32
            atol = 40 * 2.0**-22 if name in ("k", "v") else TOLERANCE
            np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("keys", ["channel", "head"])
def test_scales_are_those_of_the_calibration_data(parse: Any, keys: str) -> None:
    graph = build(parse, *FIRES["keys and values are joined"][:3])
    calibrated = [feeds(graph, seed) for seed in (1, 2, 3)]
    changed, result = int8(graph, calibrated, keys=keys, calibration=Calibration(samples=2))
    cache = Int8Cache.of(changed)
    assert cache is not None
    for name, source in (("pk", "n"), ("pv", "nv")):
        cached = [sample[held] for sample in calibrated[:2] for held in (name, source)]
        seen = np.abs(np.concatenate(cached, axis=2)).max(axis=(0, 2))
        wanted = seen if keys == "channel" and name == "pk" else seen.max(axis=1, keepdims=True)
        found = cache.scale(name)[:, 0] * 127 / wanted
        # Rounded up to float16, and a channel's part of the widest too: 2^-10 each.
        assert (found >= 1 - 2.0**-23).all()
        assert (found <= (1 + 2.0**-10) ** 2).all()
    assert result.scales.activations == {name: pytest.approx(cache.scale(name).max()) for name in ("pk", "pv")}
    by = "head and channel" if keys == "channel" else "head"
    assert [rewrite.detail for rewrite in result.rewrites] == [
        f"'pk' 32 → 8 bytes a token, a scale for each {by}",
        "'pv' 32 → 8 bytes a token, a scale for each head",
    ]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_cached_number_moves_by_more_than_half_a_scale(parse: Any, data: Any) -> None:
    width = st.floats(2.0**-12, 2.0**10, width=32)
    graph = build(parse, *FIRES["keys and values are joined"][:3])
    sample = feeds(graph, data.draw(st.integers(0, 99)))
    sample["n"] *= np.array(data.draw(st.lists(width, min_size=4, max_size=4)), np.float32)
    changed, _ = int8(graph, [sample])
    cache = Int8Cache.of(changed)
    assert cache is not None
    found = Session(changed).run(sample | {"pk": sample["pk"][:, :, :0], "pv": sample["pv"][:, :, :0]})
    for name, source, past in (("k", "n", "pk"), ("v", "nv", "pv")):
        # Half a scale, and the roundings of a division and two products.
        bound = cache.scale(past) * 0.5 + np.abs(sample[source]) * 2.0**-21
        assert (np.abs(found[name] - sample[source]) <= bound).all()


def test_a_channel_that_is_always_0_stays_0(parse: Any) -> None:
    graph = build(parse, *FIRES["keys and values are joined"][:3])
    sample = feeds(graph, 1)
    for name in ("pk", "n"):
        sample[name][..., 2] = 0
    for name in ("pv", "nv"):
        sample[name][:] = 0
    found = Session(int8(graph, [sample])[0]).run(sample)
    assert not found["k"][:, :, PAST:, 2].any()
    assert not found["v"][:, :, PAST:].any()
    assert np.isfinite(found["y"]).all()


@pytest.mark.parametrize("case", ["a cache inside of a causal operator", "static caches that begin anew"])
def test_the_reference_evaluator_agrees(parse: Any, case: str) -> None:
    graph = build(parse, *FIRES[case][:3])
    sample = feeds(graph, 1)
    changed, _ = int8(graph, [sample])
    cache = Int8Cache.of(changed)
    assert cache is not None
    levels = cache.feeds(sample)
    assert {name for name, value in levels.items() if value.dtype == np.int8} == {"pk", "pv"}
    evaluator = onnx.reference.ReferenceEvaluator(to_model(changed))
    expected = dict(zip(evaluator.output_names, evaluator.run(None, levels), strict=True))
    found = Session(changed).run(levels)
    np.testing.assert_allclose(found["y"], expected["y"], rtol=0, atol=TOLERANCE)
    for name in ("k", "v"):
        assert found[name].dtype == np.int8
        np.testing.assert_array_equal(found[name], expected[name])


def test_levels_that_are_handed_on_stay_what_they_are(parse: Any) -> None:
    """A loop that knows nothing of scales gets what one gets that hands on floats."""
    graph = build(parse, *FIRES["a cache inside of a causal operator"][:3])
    changed, _ = int8(graph, [feeds(graph, seed) for seed in (1, 2)])
    session, cache = Session(changed), Int8Cache.of(changed)
    assert cache is not None
    held = {name: np.zeros((BATCH, 2, 0, 4), np.int8) for name in ("pk", "pv")}
    floats = {name: value.astype(np.float32) for name, value in held.items()}
    for step, new in enumerate((3, 1, 2)):
        sample = feeds(graph, step, 0, new)
        found, expected = session.run({**sample, **held}), session.run({**sample, **floats})
        np.testing.assert_array_equal(found["y"], expected["y"])
        held, floats = ({"pk": run["k"], "pv": run["v"]} for run in (found, expected))
        for name, value in floats.items():
            np.testing.assert_array_equal(quantized(value, cache.scale(name)), held[name])


@pytest.mark.parametrize("case", LEAVES_ALONE)
def test_leaves_alone(parse: Any, case: str) -> None:
    inputs, outputs, body, reason = LEAVES_ALONE[case]
    graph = build(parse, inputs, outputs, body)
    before = to_model(graph)
    result = QuantizeKvCache().run(graph, Context(ledger=Ledger(0), activations=SampledActivations([feeds(graph, 1)])))
    assert result.rewrites == []
    assert reason in [miss.reason for miss in result.near_misses]
    assert to_model(graph) == before


def test_a_graph_without_a_cache_is_not_its_business(parse: Any) -> None:
    for body in ("k = Concat<axis = 2>(pk, n) y = Attention(q, k, k)", "y = Attention(q, n, n)"):
        graph = build(parse, GROWING, "float[B,4,S,4] y", body)
        with pytest.raises(Skip, match="no cache goes into the graph"):
            QuantizeKvCache().run(graph, Context())
        assert Int8Cache.of(graph) is None


def test_what_it_cannot_calibrate_on(parse: Any) -> None:
    graph = build(parse, *FIRES["keys and values are joined"][:3])
    with pytest.raises(LlmcError, match="give some with --calibration DATA"):
        QuantizeKvCache().run(graph, Context())
    sample = feeds(graph, 1)
    sample["n"][0, 0, 0, 0] = np.inf
    with pytest.raises(LlmcError, match="the cache 'k' is NaN or infinite on sample 1"):
        int8(graph, [sample])


def test_any_one_rewrite_can_be_refused(parse: Any) -> None:
    graph = build(parse, *FIRES["keys and values are joined"][:3])
    sample = feeds(graph, 1)
    changed = copy_graph(graph)
    result = QuantizeKvCache().run(changed, Context(Ledger(1), SampledActivations([sample])))
    cache = Int8Cache.of(changed)
    assert len(result.rewrites) == 1
    assert cache is not None
    assert cache.caches == {"pk": "k"}
    assert [t.dtype for t in changed.outputs] == [np.float32, np.int8, np.float32]
    whole = Int8Cache(caches={**cache.caches, "pv": "v"}, scales={**cache.scales, "pv": [[1.0]] * 2})
    rounded = on_grid(whole, sample) | {name: sample[name] for name in ("nv", "pv")}
    expected = Session(graph).run(rounded)
    np.testing.assert_allclose(Session(changed).run(sample)["y"], expected["y"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("first", [True, False])
def test_in_half_precision(parse: Any, convert: Any, first: bool) -> None:
    """Before convert-fp16, or behind it: then the caches were float16."""
    graph = build(parse, *FIRES["static caches, each sequence at a place of its own"][:3])
    sample = feeds(graph, 1)
    changed = copy_graph(graph)
    if first:
        convert(changed, sample, inputs_outputs="convert")
    changed, _ = int8(changed, [sample])
    if not first:
        convert(changed, sample, inputs_outputs="convert")
    halves = {np.dtype(t.dtype).name for node in changed.nodes if node.op == "DequantizeLinear" for t in node.outputs}
    assert halves == {"float16"}
    cache = Int8Cache.of(changed)
    assert cache is not None
    expected = Session(graph).run(on_grid(cache, sample))["y"]
    # Of values up to 40: inputs, what is divided and multiplied, scores, weights and the result are rounded; and a
    # number that is rounded across the middle of two levels goes to the other one, 1/254 of the widest.
    found = Session(changed).run(sample)["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=40 * (16 * 2.0**-11 + 1 / 254))


@pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason=availability("tensorrt-rtx").missing)
@pytest.mark.parametrize(
    ("case", "half"),
    [
        ("static caches, each sequence at a place of its own", True),
        pytest.param("static caches, each sequence at a place of its own", False, marks=pytest.mark.slow),
        pytest.param("keys and values are joined", True, marks=pytest.mark.slow),
        pytest.param("keys and values are joined", False, marks=pytest.mark.slow),
    ],
)
def test_tensorrt_builds_it(parse: Any, convert: Any, case: str, half: bool, tmp_path: Path) -> None:
    inputs, outputs, body, _ = FIRES[case]
    graph = build(parse, inputs, outputs, body)
    changed, _ = int8(graph, [feeds(graph, 1)])
    if half:
        convert(changed, inputs_outputs="convert")
    sizes = {"B": Range(1, 2, 4), "S": Range(1, 2, 4), "P": Range(0, 2, 4)}
    shapes = {name: sizes[name] for name in sizes if name != "P" or "joined" in case}
    target, request = TensorRT("tensorrt-rtx"), BuildRequest([shapes], (80, 86, 89, 120))
    assert target.check(changed, request) == []
    save_model(changed, tmp_path / "model.onnx")
    built = target.build(tmp_path / "model.onnx", tmp_path, request, lambda _: None)
    caches = [text for text in built.facts["outputs"] if "int8" in text]  # type: ignore[attr-defined]
    assert len(caches) == 2
