from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from llmc.compiler.calibrate import SampledActivations
from llmc.passes.base import LlmcError
from llmc.passes.graph.in_parts import row_slices
from llmc.passes.precision import rows as rows_module
from llmc.passes.precision.rows import FOLDS, KEPT, ExactProducts, Rows, Stack, batched, digest, gather_rows


def state(rows):
    return [(fold.low.tolist(), fold.high.tolist(), fold.digests.tolist(), fold.rows.tolist()) for fold in rows.folds]


@settings(deadline=None, max_examples=30)
@given(
    npst.arrays(np.float32, (40, 3), elements=st.floats(-100, 100, width=32)),
    st.permutations(range(40)),
    st.lists(st.integers(0, 40), max_size=4).map(sorted),
)
def test_what_is_remembered_depends_neither_on_order_nor_on_batches(values, order, cuts):
    whole, pieces = Rows(3), Rows(3)
    whole.add(values)
    for piece in np.split(values[order], cuts):
        pieces.add(piece)
    assert state(whole) == state(pieces)


def test_ranges_are_of_all_rows_and_the_kept_ones_are_bounded():
    values = np.random.default_rng(0).standard_normal((5000, 4)).astype(np.float32)
    rows = Rows(4)
    for piece in np.split(values, 50):
        rows.add(piece)
    assert np.array_equal(rows.low, values.min(axis=0))
    assert np.array_equal(rows.high, values.max(axis=0))
    assert [fold.rows.shape for fold in rows.folds] == [(KEPT, 4)] * FOLDS
    known = {row.tobytes() for row in values}
    kept = [row.tobytes() for fold in rows.folds for row in fold.rows]
    assert set(kept) <= known
    assert len(set(kept)) == len(kept), "no row stands in two parts"


def test_digests_spread_evenly_and_tell_rows_apart():
    values = np.arange(40_000, dtype=np.float32).reshape(-1, 4)
    digests = digest(values)
    assert len(set(digests.tolist())) == len(digests)
    # of 10,000 coins, 5 standard deviations
    assert abs(int((digests % 2).sum()) - 5000) < 250
    assert abs(int((digests >> np.uint64(63)).sum()) - 5000) < 250


def test_the_last_axis_holds_the_channels(parse):
    graph = parse("(float[B,S,4] x) => (float[B,S,4] y) { h = Relu(x) y = Neg(h) }")
    samples = [{"x": np.full((1, n, 4), n, np.float32)} for n in (1, 2, 3)]
    found = gather_rows(SampledActivations(samples), graph, {"h": 4}, 2)
    assert found["h"].high.tolist() == [2, 2, 2, 2]
    assert sum(len(fold.rows) for fold in found["h"].folds) == 3


def test_a_tensor_that_is_not_finite_is_an_error(parse):
    graph = parse("(float[B,4] x) => (float[B,4] y) { h = Sqrt(x) y = Neg(h) }")
    with pytest.raises(LlmcError, match="tensor 'h' is NaN or infinite on sample 1"):
        gather_rows(SampledActivations([{"x": np.full((1, 4), -1, np.float32)}]), graph, {"h": 4}, 2)


def test_tensors_are_cut_to_what_fits_in_memory():
    assert batched({}, 1) == []
    assert batched({"a": 8, "b": 8}, 1) == [{"a": 8}, {"b": 8}]
    assert batched({"a": 8, "b": 8, "c": 8}, 2 * 8 * 4 * FOLDS * (KEPT + 4)) == [{"a": 8, "b": 8}, {"c": 8}]


@settings(deadline=None, max_examples=30)
@given(
    outputs=st.lists(st.integers(1, 9), min_size=1, max_size=3), part=st.integers(1, 40), seed=st.integers(0, 1 << 20)
)
def test_products_in_parts_are_those_of_the_whole(outputs, part, seed):
    """Of matrices of either order in memory, one under the other, by NumPy in float64."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((6, 5)).astype(np.float32)
    matrices = [rng.standard_normal((5, n)).astype(np.float16).T for n in outputs]
    matrices[0] = np.ascontiguousarray(matrices[0])
    whole = np.concatenate(matrices).astype(np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "row_slices", lambda shape: row_slices(shape, part))
        stack = Stack(matrices)
        assert stack.outputs == sum(outputs)
        np.testing.assert_array_equal(stack.peaks(), np.abs(whole).max(axis=0))
        found = ExactProducts(rows, stack).mean_square(lambda weight, exact: 1.5 * (rows @ weight.T) - exact + 7)
    exact = rows.astype(np.float64) @ whole.T
    spread = np.mean((exact - exact.mean(axis=0)) ** 2, axis=1)
    expected = np.mean(0.25 * spread / spread)  # half of each result is off, and 7 that a bias takes
    # float32 sums of 5 products, of results that the 7 makes up to some ten times as large
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_outputs_are_taken_evenly_from_all_matrices(monkeypatch):
    monkeypatch.setattr(rows_module, "OUTPUTS", 10)
    few, many = np.arange(4.0).reshape(4, 1), np.arange(100.0, 130).reshape(30, 1)
    assert [m[:, 0].tolist() for m in Stack([few, many]).thinned().matrices] == [[0], [*range(100, 130, 4)]]
    assert [m[:, 0].tolist() for m in Stack([few]).thinned().matrices] == [[0, 1, 2, 3]]
