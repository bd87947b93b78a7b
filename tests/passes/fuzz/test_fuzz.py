"""Random graphs through every pass that keeps the numbers, in a random order: optimized ≡ original in ONNX Runtime.

The graphs favour what rules look for: pieces of GELU, normalizations and attention, Transpose pairs, Reshape chains,
shape arithmetic, constants that are neutral or are √2. Each tensor carries the interval that its values lie in, so
that nothing overflows, and nothing is divided by, or compared near a jump, that rounding may move.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from onnx import TensorProto, helper

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, LlmcError, Pass, Skip, discover
from llmc.passes.graph import Array, from_model, to_model

RandomModel = Callable[[random.Random], onnx.ModelProto]
SIZE = 3
"""Of every symbolic dimension."""


def feeds_of(model: onnx.ModelProto, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {"q": np.array(seed % 2 == 0)}
    for info in model.graph.input[:-1]:
        shape = [d.dim_value or SIZE for d in info.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        values = rng.integers(0, 3, shape) if dtype == np.int64 else rng.uniform(-3, 3, shape)
        feeds[info.name] = values.astype(dtype)
    return feeds


def random_order(rng: random.Random) -> list[Pass]:
    """Every pass that keeps the numbers and needs no data, each after those that it says it comes after."""
    kinds = {key: kind for key, kind in discover().items() if kind.safety != "lossy" and not kind.needs}
    waiting, order = sorted(kinds), []
    while waiting:
        key = rng.choice([k for k in waiting if not set(kinds[k].after) & set(waiting)])
        waiting.remove(key)
        order.append(kinds[key]())
    return order


def optimized(model: onnx.ModelProto, passes: Sequence[Pass], context: Context) -> onnx.ModelProto:
    graph = from_model(model)
    for step in passes:
        try:
            step.run(graph, context)
        except Skip:
            continue
    return to_model(graph)


def deviation(
    model: onnx.ModelProto, feeds: dict[str, Array], expected: dict[str, Array], scale: float
) -> dict[str, float]:
    """How far outputs move where each float constant and input moves by `scale` of its value: what rounding may do."""
    most = dict.fromkeys(expected, 0.0)
    for seed in range(3):
        rng = np.random.default_rng(seed)

        def nudged(array: Array, rng: Any = rng) -> Array:
            if array.dtype.kind != "f":
                return array
            return (array.astype(np.float64) * (1 + scale * rng.choice([-1, 1], array.shape))).astype(array.dtype)

        moved_model = onnx.ModelProto()
        moved_model.CopyFrom(model)
        for tensor in moved_model.graph.initializer:
            tensor.CopyFrom(onnx.numpy_helper.from_array(nudged(onnx.numpy_helper.to_array(tensor)), tensor.name))
        moved_feeds = {name: nudged(value) for name, value in feeds.items()}
        for name, value in Session(from_model(moved_model)).run(moved_feeds).items():
            with np.errstate(invalid="ignore"):
                apart = np.abs(value.astype(np.float64) - expected[name].astype(np.float64))
            most[name] = max(most[name], float(np.nanmax(apart, initial=0.0)))
    return most


def _has_half(graph: onnx.GraphProto) -> bool:
    """Whether an input is float16, or something is cast to it."""
    casts = any(node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT16 for node in graph.node)
    return casts or any(info.type.tensor_type.elem_type == TensorProto.FLOAT16 for info in graph.input)


def differences(model: onnx.ModelProto, changed: onnx.ModelProto, seed: int) -> list[str]:
    """What is wrong with `changed`; empty where it computes what `model` does."""
    try:
        onnx.checker.check_model(changed, full_check=True)
    except Exception as error:
        return [f"the checker refuses it: {error}"]
    feeds = feeds_of(model, seed)
    expected = Session(from_model(model)).run(feeds)
    try:
        found = Session(from_model(changed)).run(feeds)
    except LlmcError as error:
        return [str(error)]
    if list(found) != list(expected):
        return [f"outputs are {list(found)}, not {list(expected)}"]
    wrong = []
    allowed: dict[str, float] = {}
    half = _has_half(model.graph)
    # Rounding of the long form and of the short one: some ten operators, each to 11 or 24 bits.
    epsilon = 2.0**-10 if half else 2.0**-23
    for name, value in expected.items():
        other = found[name]
        if other.shape != value.shape or other.dtype != value.dtype:
            wrong.append(f"'{name}' is {other.dtype}{other.shape}, not {value.dtype}{value.shape}")
            continue
        a, b = value.astype(np.float64), other.astype(np.float64)
        if not np.array_equal(np.isnan(a), np.isnan(b)):
            wrong.append(f"'{name}' has NaN in other places")
            continue
        with np.errstate(invalid="ignore"):
            apart = float(np.nanmax(np.where(a == b, 0.0, np.abs(a - b)), initial=0.0))
        if apart > 16 * epsilon * max(1.0, float(np.nanmax(np.abs(a[np.isfinite(a)]), initial=0.0))):
            allowed = allowed or deviation(model, feeds, expected, epsilon)
            if value.dtype.kind != "f" or apart > 64 * allowed[name]:
                wrong.append(f"'{name}' differs by {apart:.3g}, rounding explains {allowed[name]:.3g}")
    return wrong


def culprit(model: onnx.ModelProto, passes: Sequence[Pass], seed: int) -> str:
    """The first rewrite after which the results are wrong."""
    context = Context()
    graph = from_model(model)
    names = []
    for step in passes:
        try:
            names += [f"{step.key()}: {a.rule} at '{a.node}', {a.detail}" for a in step.run(graph, context).rewrites]
        except Skip:
            continue
    for number in range(1, len(names) + 1):
        if differences(model, optimized(model, passes, Context(Ledger(number))), seed):
            return f"rewrite {number} is wrong: {names[number - 1]}"
    return "all rewrites together are right, one by one"


def check(model: onnx.ModelProto, rng: random.Random) -> bool:
    """Fail where the passes make something else of the model; False for one that ONNX Runtime itself cannot run.

    With optimizations off it still drops a Cast to the same type, and with it what only a subgraph reads.
    """
    passes, seed = random_order(rng), rng.randrange(1 << 16)
    try:
        Session(from_model(model)).run(feeds_of(model, seed))
    except LlmcError:
        return False
    wrong = differences(model, optimized(model, passes, Context()), seed)
    assert not wrong, f"{wrong}\n{culprit(model, passes, seed)}\n{onnx.printer.to_text(model)}"
    return True


FUZZ = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@settings(FUZZ, max_examples=300)
@given(st.randoms(use_true_random=False))
def test_a_few_hundred_graphs_compute_the_same(random_model: RandomModel, rng: random.Random) -> None:
    assume(check(random_model(rng), rng))


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(20))
def test_twenty_thousand_graphs_compute_the_same(random_model: RandomModel, thousand: int) -> None:
    ran = 0
    for seed in range(1000 * thousand, 1000 * (thousand + 1)):
        rng = random.Random(seed)
        ran += check(random_model(rng), rng)
    assert ran >= 995


FOUND = {
    "a Slice of everything that the graph gives back": (
        "(float[N,4] x0, bool q) => (float[N,4] y) <int64[1] start = {-4}, int64[1] end = {2147483647}, "
        "int64[1] last = {-1}, int64[1] one = {1}> { y = Slice(x0, start, end, last, one) }"
    ),
    "a pattern of which one half stands in a subgraph": (
        "(float[N,4] x0, bool q) => (float[N,4] y) <float low = {-1}, float high = {0.5}> { a = Clip(x0, low)"
        ' y = If(q) <then_branch = t () => (float[N,4] z) { z = Clip(a, "", high) },'
        "else_branch = e () => (float[N,4] w) { w = Neg(x0) }> }"
    ),
}
"""What this test has found, made small."""


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_right(name: str) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {FOUND[name]}')
    for seed in range(10):
        assert check(model, random.Random(seed))
