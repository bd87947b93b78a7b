from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from llmc.compiler.errors import LlmcError
from llmc.compiler.verification import breaches, compare, row_cosines, verify

FLOATS = st.floats(-1e3, 1e3, width=32)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_metrics_are_their_definitions(data: st.DataObject) -> None:
    shape = data.draw(array_shapes(min_dims=1, max_dims=3, max_side=5))
    expected = data.draw(arrays(np.float32, shape, elements=FLOATS))
    found = data.draw(arrays(np.float32, shape, elements=FLOATS))
    with patch("llmc.compiler.verification.metrics.CHUNK", data.draw(st.sampled_from([1, 10, 1 << 20]))):
        (line,) = compare([({"y": expected}, {"y": found})])
    e, f = expected.astype(np.float64), found.astype(np.float64)
    assert line.max_abs == pytest.approx(np.abs(f - e).max())
    if np.linalg.norm(e) > 0:
        relative = np.linalg.norm(f - e) / np.linalg.norm(e)
        assert line.relative_l2 == pytest.approx(relative)
        if relative > 0:
            assert line.sqnr_db == pytest.approx(10 * np.log10((e**2).sum() / ((f - e) ** 2).sum()))
    assert -1 <= line.cosine <= 1


def test_sums_run_over_samples_of_any_size() -> None:
    rng = np.random.default_rng(0)
    pairs = [({"y": rng.standard_normal((n, 4))}, {"y": rng.standard_normal((n, 4))}) for n in (1, 5, 2)]
    whole = ({"y": np.concatenate([e["y"] for e, _ in pairs])}, {"y": np.concatenate([f["y"] for _, f in pairs])})
    (apart,), (together,) = compare(pairs), compare([whole])
    for metric in ("max_abs", "relative_l2", "cosine", "sqnr_db"):
        assert getattr(apart, metric) == pytest.approx(getattr(together, metric))


def test_cosine_of_rows() -> None:
    expected = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    found = np.array([[0.0, 2.0], [0.0, 0.0], [-2.0, -2.0], [1.0, 0.0]])
    np.testing.assert_allclose(row_cosines(expected, found), [0, 1, -1, 0], atol=1e-15)  # one rounding of 2^-53


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_break_every_budget(bad: float) -> None:
    numerics = compare([({"y": np.ones(3)}, {"y": np.array([1.0, bad, 1.0])})])
    assert not numerics[0].finite
    assert breaches(numerics, {}) == ["output 'y' has NaN or infinity where the reference has none"]


def test_infinity_in_both_is_equal() -> None:
    value = np.array([1.0, -np.inf])
    (line,) = compare([({"y": value}, {"y": value.copy()})])
    assert (line.finite, line.max_abs, line.sqnr_db) == (True, 0.0, None)


@pytest.mark.parametrize(
    ("metric", "bound", "breaks"),
    [("cosine", 0.5, False), ("cosine", 0.999999, True), ("max_abs", 0.2, False), ("max_abs", 0.05, True),
     ("relative_l2", 0.1, False), ("relative_l2", 0.01, True), ("sqnr_db", 20, False), ("sqnr_db", 60, True)],
)  # fmt: skip
def test_budgets(metric: str, bound: float, breaks: bool) -> None:
    numerics = compare([({"y": np.array([1.0, 2.0])}, {"y": np.array([1.0, 2.1])})])
    assert bool(breaches(numerics, {metric: bound})) is breaks


def test_shapes_must_agree() -> None:
    with pytest.raises(LlmcError, match=r"output 'y' has shape \(2,\), the reference \(3,\)"):
        compare([({"y": np.ones(3)}, {"y": np.ones(2)})])


def test_verify_compares_two_graphs(parse: Any, random_feeds: Any) -> None:
    right = parse("(float[N,4] x) => (float[N,4] y) <float c = {2}> { y = Mul(x, c) }")
    wrong = parse("(float[N,4] x) => (float[N,4] y) <float c = {2.5}> { y = Mul(x, c) }")
    samples = [random_feeds(right, seed, size) for seed, size in ((0, 3), (1, 5))]
    (same,), (off,) = verify(right, right, samples), verify(wrong, right, samples)
    assert same.max_abs == 0
    assert off.relative_l2 == pytest.approx(0.25)
    assert off.cosine == pytest.approx(1)
