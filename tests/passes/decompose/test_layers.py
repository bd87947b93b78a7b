"""Activations, normalisations, products, embeddings and rotary embedding of com.microsoft."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.passes.base import Context
from llmc.passes.decompose.decompose_contrib import DecomposeContrib
from llmc.passes.graph import Array, to_model

TOLERANCE = 2e-5
"""Both sides compute in float32 and sum in another order: up to some hundred roundings of 6e-8 of the largest value."""
Rng = np.random.Generator


def normal(rng: Rng, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def maybe(rng: Rng, value: Array) -> Array | None:
    return value if rng.random() < 0.5 else None


def sizes(rng: Rng, count: int, low: int = 1, high: int = 6) -> list[int]:
    return [int(n) for n in rng.integers(low, high, count)]


def activation(rng: Rng) -> dict[str, Any]:
    shape = sizes(rng, int(rng.integers(1, 5)))
    op = str(rng.choice(["Gelu", "BiasGelu", "FastGelu", "QuickGelu"]))
    inputs: list[Any] = [normal(rng, *shape) * 3]
    if op == "BiasGelu" or (op == "FastGelu" and rng.random() < 0.5):
        inputs.append(normal(rng, shape[-1]))
    attributes = {"alpha": float(rng.choice([1.0, 1.702, 0.5]))} if op == "QuickGelu" and rng.random() < 0.7 else {}
    return {"op": op, "inputs": inputs, "attributes": attributes}


def skip_layer_norm(rng: Rng) -> dict[str, Any]:
    batch, length = sizes(rng, 2)
    hidden = int(rng.integers(8, 20))
    x = normal(rng, batch, length, hidden)
    skip = normal(rng, *[(batch, length, hidden), (1, length, hidden), (length, hidden)][rng.integers(3)])
    inputs = [x, skip, normal(rng, hidden), maybe(rng, normal(rng, hidden)), maybe(rng, normal(rng, hidden))]
    attributes = {"epsilon": 1e-5} if rng.random() < 0.5 else {}
    outputs = (True, False, False, True) if rng.random() < 0.5 else (True,)
    return {"op": "SkipLayerNormalization", "inputs": inputs, "attributes": attributes, "outputs": outputs}


def skip_rms_norm(rng: Rng) -> dict[str, Any]:
    shape = [*sizes(rng, int(rng.integers(1, 3))), int(rng.integers(8, 20))]
    inputs = [normal(rng, *shape), normal(rng, *shape), normal(rng, shape[-1]), maybe(rng, normal(rng, shape[-1]))]
    outputs = (True, False, False, True) if rng.random() < 0.5 else (True,)
    return {"op": "SkipSimplifiedLayerNormalization", "inputs": inputs, "outputs": outputs}


def rms_norm(rng: Rng) -> dict[str, Any]:
    shape = [*sizes(rng, 2), int(rng.integers(8, 20))]
    attributes = {"axis": -1, "epsilon": float(rng.choice([1e-6, 1e-3])), "stash_type": 1}
    inputs = [normal(rng, *shape), normal(rng, shape[-1])]
    return {"op": "SimplifiedLayerNormalization", "inputs": inputs, "attributes": attributes, "domain": ""}


def embedding(rng: Rng) -> dict[str, Any]:
    batch, length = sizes(rng, 2)
    hidden, words, positions = int(rng.integers(8, 20)), 9, 12
    ids = rng.integers(0, words, (batch, length)).astype(np.int32)
    segments = maybe(rng, rng.integers(0, 2, (batch, length)).astype(np.int32))
    mask = maybe(rng, (np.arange(length) < rng.integers(1, length + 1, (batch, 1))).astype(np.int32))
    rows = maybe(rng, rng.integers(0, positions, (int(rng.choice([1, batch])), length)).astype(np.int32))
    tables = [normal(rng, words, hidden), normal(rng, positions, hidden)]
    kinds = normal(rng, 2, hidden) if segments is not None else None
    inputs = [ids, segments, *tables, kinds, normal(rng, hidden), normal(rng, hidden), mask, rows]
    return {
        "op": "EmbedLayerNormalization",
        "inputs": inputs,
        "attributes": {"mask_index_type": 1},
        "outputs": (True, True, True),
        "types": (1, 6, 1),
    }


def matmul(rng: Rng) -> dict[str, Any]:
    flags = {name: int(rng.integers(2)) for name in ("transA", "transB", "transBatchA", "transBatchB")}
    batch, (rows, depth, columns) = sizes(rng, int(rng.integers(1, 3)), 2), sizes(rng, 3, 2)

    def shaped(last: list[int], transposed: int, spread: int) -> list[int]:
        shape = [*batch, *(last[::-1] if transposed else last)]
        return [shape[-2], *shape[:-2], shape[-1]] if spread else shape

    a = normal(rng, *shaped([rows, depth], flags["transA"], flags["transBatchA"]))
    b = normal(rng, *shaped([depth, columns], flags["transB"], flags["transBatchB"]))
    return {"op": "FusedMatMul", "inputs": [a, b], "attributes": {**flags, "alpha": float(rng.choice([1.0, 0.3]))}}


def gemm(rng: Rng) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"activation": name} for name in ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign")
    ] + [
        {"activation": "LeakyRelu", "activation_alpha": 0.1},
        {"activation": "HardSigmoid", "activation_alpha": 0.3, "activation_beta": 0.4},
        {"activation": "Elu", "activation_alpha": 0.7},
        {"activation": "ThresholdedRelu", "activation_alpha": 0.5},
        {"activation": "Selu", "activation_alpha": 0.7, "activation_gamma": 1.1},
    ]
    rows, depth, columns = sizes(rng, 3)
    turned = {name: int(rng.integers(2)) for name in ("transA", "transB")}
    a, b = normal(rng, rows, depth), normal(rng, depth, columns)
    attributes = {**kinds[rng.integers(len(kinds))], **turned, "alpha": 0.5, "beta": 2.0}
    inputs = [a.T.copy() if turned["transA"] else a, b.T.copy() if turned["transB"] else b]
    return {"op": "FusedGemm", "inputs": [*inputs, maybe(rng, normal(rng, columns))], "attributes": attributes}


def conv(rng: Rng) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [{"activation": name} for name in ("Relu", "Sigmoid", "Tanh", "HardSwish")] + [
        {"activation": "LeakyRelu", "activation_params": [0.1]},
        {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]},
        {"activation": "Clip", "activation_params": [0.0, 0.5]},
    ]
    batch, group = sizes(rng, 2, 1, 3)
    x, w = normal(rng, batch, 2 * group, 5, 4), normal(rng, 3 * group, 2, 3, 3)
    bias, residual = maybe(rng, normal(rng, 3 * group)), maybe(rng, normal(rng, batch, 3 * group, 5, 4))
    attributes = {**kinds[rng.integers(len(kinds))], "group": group, "pads": [1, 1, 1, 1]}
    return {"op": "FusedConv", "inputs": [x, w, bias, residual], "attributes": attributes}


def rotary(rng: Rng) -> dict[str, Any]:
    batch, length, heads = sizes(rng, 3)
    size = 2 * int(rng.integers(2, 5))
    partial = size - 2 if rng.random() < 0.3 else 0
    x = normal(rng, batch, heads, length, size) if rng.random() < 0.3 else normal(rng, batch, length, heads * size)
    first = np.array([3], np.int64)
    rows = rng.integers(0, 16, (batch, length)).astype(np.int64)
    tables = [normal(rng, 16, (partial or size) // 2) for _ in range(2)]
    attributes = {"interleaved": int(rng.integers(2))}
    if partial or rng.random() < 0.5:
        attributes |= {"num_heads": heads, "rotary_embedding_dim": partial}
    inputs = [x, first if rng.random() < 0.5 else rows, *tables]
    return {"op": "RotaryEmbedding", "inputs": inputs, "attributes": attributes}


def moved(rng: Rng) -> dict[str, Any]:
    """Operators that ONNX took over, or had under another name."""
    x = normal(rng, 2, 3, 3)
    kinds: list[dict[str, Any]] = [
        {"op": "Trilu", "inputs": [x, np.array(1)], "attributes": {"upper": int(rng.integers(2))}},
        {"op": "Trilu", "inputs": [x]},
        {"op": "GatherND", "inputs": [x, rng.integers(0, 2, (2, 4, 2)).astype(np.int32)]},
        {"op": "ExpandDims", "inputs": [x, np.array(-1, np.int32)], "constants": frozenset({1})},
        {"op": "TransposeMatMul", "inputs": [x, x], "attributes": {"transA": 1, "alpha": 0.5}},
    ]
    return kinds[rng.integers(len(kinds))]


DRAWS = (activation, skip_layer_norm, skip_rms_norm, rms_norm, embedding, matmul, gemm, conv, rotary, moved)


@pytest.mark.parametrize("draw", DRAWS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), opset=st.sampled_from([14, 17, 21, 23]), symbolic=st.booleans())
def test_gives_what_the_kernel_of_onnx_runtime_gives(
    draw: Any, seed: int, opset: int, symbolic: bool, one_node: Any, decomposed: Any
) -> None:
    case = one_node(**draw(np.random.default_rng(seed)))
    decomposed(case, DecomposeContrib, TOLERANCE, opset, symbolic=symbolic)


RNG = np.random.default_rng(0)
X, BIAS = normal(RNG, 2, 3, 8), normal(RNG, 8)
LEAVES_ALONE = {
    "statistics are used": (
        {"op": "SkipLayerNormalization", "inputs": [X, X, BIAS], "outputs": (True, True)},
        "'y1' is used: the statistics are of use in training only",
    ),
    "an activation that nobody knows": (
        {"op": "FusedGemm", "inputs": [X[0], X[0].T], "attributes": {"activation": "Swish"}},
        "its activation is 'Swish'",
    ),
    "a vector transposed": (
        {"op": "FusedMatMul", "inputs": [X, BIAS], "attributes": {"transB": 1}},
        "it multiplies a vector with transB",
    ),
    "a ragged batch": (
        {
            "op": "RotaryEmbedding",
            "inputs": [X, np.zeros((2, 3), np.int64), normal(RNG, 9, 4), normal(RNG, 9, 4)],
            "attributes": {"is_packed_batching": 1},
        },
        "its is_packed_batching is 1",
    ),
    "an axis that is computed": (
        {"op": "ExpandDims", "inputs": [X, np.array(1, np.int32)]},
        "its axis is computed",
    ),
    "an operator that no pass knows": (
        {"op": "CDist", "inputs": [X[0], X[0]], "attributes": {"metric": "euclidean"}},
        "no pass spells it out",
    ),
    "no inverse in ONNX": ({"op": "Inverse", "inputs": [X[:, :3, :3]]}, "ONNX has no matrix inverse"),
}


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, one_node: Any) -> None:
    case, reason = LEAVES_ALONE[name]
    graph = one_node(**case).graph(23)
    before = to_model(graph)
    result = DecomposeContrib().run(graph, Context())
    assert result.rewrites == []
    assert to_model(graph).graph.node == before.graph.node
    assert [reason in miss.reason for miss in result.near_misses] == [True]


# What only GPUs have kernels for: compared with what its documentation says


def gelu(x: Array) -> Array:
    from math import erf

    return np.vectorize(lambda v: 0.5 * v * (1 + erf(v / 2**0.5)))(x).astype(np.float32)  # type: ignore[no-any-return]


def group_normalized(x: Array, scale: Array, bias: Array, groups: int) -> Array:
    n, h, w, c = x.shape
    parts = x.reshape(n, h * w, groups, c // groups).astype(np.float64)
    mean, variance = parts.mean(axis=(1, 3), keepdims=True), parts.var(axis=(1, 3), keepdims=True)
    return ((parts - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * scale + bias  # type: ignore[no-any-return]


IMAGE, CHANNELS = normal(RNG, 2, 3, 3, 8), normal(RNG, 8)
SUM = IMAGE + normal(np.random.default_rng(1), 2, 8)[:, None, None, :] + CHANNELS
NORMAL = group_normalized(IMAGE, CHANNELS, BIAS, 4)
DOCUMENTED = {
    "BiasAdd": ([X, BIAS, X], {}, X + BIAS + X),
    "BiasSplitGelu": ([X, BIAS], {}, (X + BIAS)[..., :4] * gelu((X + BIAS)[..., 4:])),
    "BiasDropout": ([X, BIAS, X], {}, X + BIAS + X),
    "GemmFastGelu": ([X, normal(RNG, 8, 4)], {}, None),
    "GroupNorm": ([IMAGE, CHANNELS, BIAS], {"groups": 4, "activation": 1}, NORMAL / (1 + np.exp(-NORMAL))),
    "SkipGroupNorm": (
        [IMAGE, CHANNELS, BIAS, normal(np.random.default_rng(1), 2, 8), CHANNELS],
        {"groups": 2, "activation": 0},
        group_normalized(SUM, CHANNELS, BIAS, 2),
    ),
}


@pytest.mark.parametrize("op", DOCUMENTED)
def test_gives_what_the_documentation_says(op: str, one_node: Any) -> None:
    from llmc.compiler.session import Session

    inputs, attributes, expected = DOCUMENTED[op]
    case = one_node(op, inputs, attributes)
    graph = case.graph(21)
    assert len(DecomposeContrib().run(graph, Context()).rewrites) == 1
    found = Session(graph).run(case.feeds)["y0"]
    if expected is None:  # the tanh form of GELU is within 1e-3 of the exact one
        assert np.allclose(found, gelu(inputs[0] @ inputs[1]), rtol=0, atol=1e-3)
    else:
        assert np.allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
