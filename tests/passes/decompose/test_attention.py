"""Attention, MultiHeadAttention, GroupQueryAttention and QAttention of com.microsoft."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.decompose.decompose_contrib import DecomposeContrib
from llmc.passes.decompose.decompose_quantized import DecomposeQuantized
from llmc.passes.graph import Array, to_model

TOLERANCE = 2e-5
"""Both sides compute in float32 and sum in another order."""
MASKED_TOLERANCE = 1e-3
"""Scores near −10000, where every key is masked, are rounded to 2^-10: exp makes that a relative error."""
Rng = np.random.Generator
i32 = np.int32


def normal(rng: Rng, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def maybe(rng: Rng, value: Any) -> Any:
    return value if rng.random() < 0.5 else None


def key_mask(rng: Rng, batch: int, rows: int, keys: int, past: int = 0) -> Array | None:
    """None, lengths, keys, or keys of each query; every sequence has a key at least."""
    lengths = rng.integers(max(1, past), keys + 1, batch).astype(i32)
    by_key = (np.arange(keys) < lengths[:, None]).astype(i32)
    kinds: list[Any] = [None, by_key, np.repeat(by_key[:, None], rows, 1)]
    return kinds[rng.integers(3)] if past else [*kinds, lengths][rng.integers(4)]  # type: ignore[no-any-return]


def attention(rng: Rng) -> dict[str, Any]:
    batch, rows, heads, size = (int(n) for n in rng.integers(2, 5, 4))
    past = int(rng.integers(0, 4)) if rng.random() < 0.4 else None
    hidden = heads * size
    values = hidden if past is not None or rng.random() < 0.7 else heads * (size + 1)
    width = 2 * hidden + values
    mask = key_mask(rng, batch, rows, rows + (past or 0), past or 0)
    if mask is not None and mask.ndim == 1 and past is not None:
        mask = None
    bias = maybe(rng, normal(rng, int(rng.choice([1, batch])), int(rng.choice([1, heads])), rows, rows + (past or 0)))
    inputs = [normal(rng, batch, rows, 6), normal(rng, 6, width) / 3, normal(rng, width), mask]
    inputs += [normal(rng, 2, batch, heads, past, size), None] if past is not None else [None, bias]
    attributes: dict[str, Any] = {"num_heads": heads, "unidirectional": int(rng.integers(2))}
    if values != hidden:
        attributes["qkv_hidden_sizes"] = [hidden, hidden, values]
    if rng.random() < 0.3:
        attributes |= {"scale": 0.3, "mask_filter_value": -100.0}
    outputs = (True, True) if past is not None or (rng.random() < 0.3 and values == hidden) else (True,)
    return {"op": "Attention", "inputs": inputs, "attributes": attributes, "outputs": outputs}


def multi_head(rng: Rng) -> dict[str, Any]:
    batch, rows, heads, size = (int(n) for n in rng.integers(2, 5, 4))
    causal = int(rng.integers(2))
    past = int(rng.integers(0, 4)) if rng.random() < 0.3 else None
    keys = rows if causal or past is not None else int(rng.integers(1, 6))
    hidden, total = heads * size, keys + (past or 0)
    values = hidden if past is not None else heads * int(rng.integers(2, 5))
    in_heads = past is None and not causal and rng.random() < 0.3
    k, v = normal(rng, batch, keys, hidden), normal(rng, batch, keys, values)
    if in_heads:
        k, v = normal(rng, batch, heads, keys, size), normal(rng, batch, heads, keys, size)
    pasts = [normal(rng, batch, heads, past, size) for _ in range(2)] if past is not None else [None, None]
    bias = None if in_heads else maybe(rng, normal(rng, 2 * hidden + values))
    scores = maybe(rng, normal(rng, int(rng.choice([1, batch])), int(rng.choice([1, heads])), rows, total))
    mask = key_mask(rng, batch, rows, total, past or 0)
    mask = None if mask is not None and mask.ndim == 1 and past is not None else mask
    attributes = {"num_heads": heads, "unidirectional": causal}
    outputs = (True, True, True) if past is not None else (True,)
    inputs = [normal(rng, batch, rows, hidden), k, v, bias, mask, scores, *pasts]
    return {"op": "MultiHeadAttention", "inputs": inputs, "attributes": attributes, "outputs": outputs}


def quantized(rng: Rng) -> dict[str, Any]:
    batch, rows, heads, size = (int(n) for n in rng.integers(2, 5, 4))
    width = 3 * heads * size
    single = rng.random() < 0.5
    scale = np.float32(0.01) if single else rng.uniform(0.005, 0.02, width).astype(np.float32)
    zero = np.int8(3) if single else np.zeros(width, np.int8)
    mask = key_mask(rng, batch, rows, rows)
    mask = None if mask is not None and mask.ndim == 3 else mask
    levels = [
        rng.integers(0, 256, (batch, rows, 6)).astype(np.uint8),
        rng.integers(-128, 128, (6, width)).astype(np.int8),
    ]
    zeros = [np.array(120, np.uint8), np.asarray(zero)]
    inputs = [*levels, normal(rng, width), np.float32(0.01).reshape(()), np.asarray(scale), mask, *zeros]
    attributes = {"num_heads": heads, "unidirectional": int(rng.integers(2))}
    return {"op": "QAttention", "inputs": inputs, "attributes": attributes, "types": (1,)}


DRAWS = ((attention, DecomposeContrib), (multi_head, DecomposeContrib), (quantized, DecomposeQuantized))


@pytest.mark.parametrize(("draw", "pass_class"), DRAWS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), opset=st.sampled_from([14, 23]))
def test_gives_what_the_kernel_of_onnx_runtime_gives(
    draw: Any, pass_class: Any, seed: int, opset: int, one_node: Any, decomposed: Any
) -> None:
    decomposed(one_node(**draw(np.random.default_rng(seed))), pass_class, TOLERANCE, opset)


def test_a_sequence_without_any_key(one_node: Any, decomposed: Any) -> None:
    rng = np.random.default_rng(0)
    inputs = [normal(rng, 2, 4, 12), normal(rng, 12, 36), normal(rng, 36), np.zeros((2, 4), i32)]
    decomposed(one_node("Attention", inputs, {"num_heads": 3}), DecomposeContrib, MASKED_TOLERANCE)


@pytest.mark.parametrize("packed", ["QKV", "KV"])
def test_packed_inputs(packed: str, one_node: Any) -> None:
    """The CPU has no kernel that takes them packed: compared with its kernel that takes them apart."""
    rng = np.random.default_rng(0)
    parts = [normal(rng, 2, 4, 3, 5) for _ in range(3)]
    apart = one_node("MultiHeadAttention", [p.reshape(2, 4, 15) for p in parts], {"num_heads": 3})
    expected = Session(apart.graph()).run(apart.feeds)["y0"]
    inputs = [np.stack(parts, 3)] if packed == "QKV" else [parts[0].reshape(2, 4, 15), np.stack(parts[1:], 3)]
    together = one_node("MultiHeadAttention", inputs, {"num_heads": 3})
    graph = together.graph()
    DecomposeContrib().run(graph, Context())
    assert np.allclose(Session(graph).run(together.feeds)["y0"], expected, rtol=0, atol=TOLERANCE)


def grouped(rng: Rng) -> tuple[dict[str, Any], list[int], int]:
    """A case, how many tokens each sequence has, and how many of them are new."""
    batch, kv, size = int(rng.integers(1, 4)), int(rng.integers(1, 3)), 16
    heads = kv * int(rng.integers(1, 3))
    prompt = rng.random() < 0.6
    rows = int(rng.integers(2, 6)) if prompt else 1
    past: int | None = int(rng.integers(rows, 8)) if rng.random() < 0.5 else 0
    if prompt:
        past = None if rng.random() < 0.5 else past
        total = rows
    else:
        past = int(rng.integers(2, 8))
        total = int(rng.integers(2, past + 2))
    lengths = rng.integers(1 if prompt else 2, total + 1, batch)
    lengths[0] = total
    widths = [heads * size, kv * size, kv * size]
    parts = [normal(rng, batch, rows, width) for width in widths]
    packed = rng.random() < 0.3
    rotary = rng.random() < 0.5
    tables = [normal(rng, 32, size // 2) for _ in range(2)] if rotary else [None, None]
    pasts = [normal(rng, batch, kv, past, size) for _ in range(2)] if past is not None else [None, None]
    bias = maybe(rng, normal(rng, 1, 1, rows, rows)) if past is None else None
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv}
    if rotary:
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(rng.integers(2))}
    if rng.random() < 0.3:
        attributes["local_window_size"] = int(rng.integers(1, 4))
    if rng.random() < 0.3:
        attributes["scale"] = 0.3
    inputs = [*([np.concatenate(parts, -1), None, None] if packed else parts), *pasts]
    inputs += [(lengths - 1).astype(i32), np.array(total, i32), *tables, None, bias]
    case = {"op": "GroupQueryAttention", "inputs": inputs, "attributes": attributes, "outputs": (True, True, True)}
    return case, [int(n) for n in lengths], rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1))
def test_group_query_attention(seed: int, one_node: Any, decomposed: Any) -> None:
    case, lengths, _ = grouped(np.random.default_rng(seed))

    def read(name: str, values: Array) -> Array:
        """Of the caches, what belongs to the sequences: the rest is whatever was there."""
        if name == "y0":
            return values
        return np.concatenate([values[b, :, :n].reshape(-1) for b, n in enumerate(lengths)])

    decomposed(one_node(**case), DecomposeContrib, TOLERANCE, 23, read=read)


RNG = np.random.default_rng(0)
QKV = [normal(RNG, 2, 4, 16) for _ in range(3)]
GROUPED = [*QKV, None, None, np.array([3, 3], i32), np.array(4, i32)]
LEAVES_ALONE = {
    "lengths that may be ends and starts": (
        {
            "op": "Attention",
            "inputs": [QKV[0], normal(RNG, 16, 48), None, np.array([3, 2, 0, 1], i32)],
            "attributes": {"num_heads": 2},
        },
        "'x3' has shape [4]: it may hold more than the lengths",
    ),
    "rotary inside": (
        {
            "op": "Attention",
            "inputs": [QKV[0], normal(RNG, 16, 48), None],
            "attributes": {"num_heads": 2, "do_rotary": 1},
        },
        "its do_rotary is 1",
    ),
    "a causal mask of another length": (
        {
            "op": "MultiHeadAttention",
            "inputs": [QKV[0], QKV[1][:, :3], QKV[2][:, :3]],
            "attributes": {"num_heads": 2, "unidirectional": 1},
        },
        "it is unidirectional, with 4 queries and 3 keys",
    ),
    "scores are used": (
        {
            "op": "MultiHeadAttention",
            "inputs": QKV,
            "attributes": {"num_heads": 2},
            "outputs": (True, False, False, True),
        },
        "'y3' is used: scores inside the attention",
    ),
    "a soft cap": (
        {
            "op": "GroupQueryAttention",
            "inputs": GROUPED,
            "attributes": {"num_heads": 1, "kv_num_heads": 1, "softcap": 5.0},
        },
        "its softcap is 5.0",
    ),
    "sinks": (
        {
            "op": "GroupQueryAttention",
            "inputs": [*GROUPED, None, None, None, None, normal(RNG, 1)],
            "attributes": {"num_heads": 1, "kv_num_heads": 1},
        },
        "it has sinks in its softmax",
    ),
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


def test_a_cache_of_constant_length_is_scattered_to_as_it_is(one_node: Any) -> None:
    """What TensorRT takes: TensorScatter between an input and an output of the network."""
    rng = np.random.default_rng(0)
    inputs = [normal(rng, 1, 1, 16), normal(rng, 1, 1, 16), normal(rng, 1, 1, 16)]
    inputs += [normal(rng, 1, 1, 8, 16), normal(rng, 1, 1, 8, 16), np.array([3], i32), np.array(4, i32)]
    case = one_node("GroupQueryAttention", inputs, {"num_heads": 1, "kv_num_heads": 1}, (True, True, True))
    graph = case.graph(24)
    for output in graph.outputs[1:]:
        output.shape = [1, 1, 8, 16]
    DecomposeContrib().run(graph, Context())
    scatters = [node for node in graph.nodes if node.op == "TensorScatter"]
    assert [(n.inputs[0].name, n.outputs[0].name) for n in scatters] == [("x3", "y1"), ("x4", "y2")]
