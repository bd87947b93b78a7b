from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.blame.search import Search, badness
from llmc.compiler.report import OutputNumerics

LIMIT = 0.5


def line(error: float) -> OutputNumerics:
    return OutputNumerics(output="y", relative_l2=error, cosine=1 - error, finite=math.isfinite(error))


def search(errors: Sequence[float], ends: Sequence[int]) -> Search:
    """Over a compile whose error after rewrite n is `errors[n]`, with passes that end at `ends`."""
    replay: Any = SimpleNamespace(
        count=len(errors) - 1,
        boundaries=lambda: sorted({0, *ends, len(errors) - 1}),
        graph_after=lambda number: number,
        owner=lambda _number: SimpleNamespace(step=SimpleNamespace(key=lambda: "pass")),
    )
    verifier: Any = SimpleNamespace(measure=lambda number: [line(errors[number])])
    return Search(replay, verifier, lambda _key: {"relative_l2": LIMIT})


ERRORS = st.lists(st.sampled_from([0.0, 0.1, 0.4, 0.6, 0.9, math.inf]), min_size=1, max_size=60)
ENDS = st.lists(st.integers(0, 59), max_size=8)


@given(ERRORS, ENDS)
@settings(max_examples=300, deadline=None)
def test_bisection_finds_the_first_where_errors_only_grow(errors: list[float], ends: list[int]) -> None:
    errors.sort()
    tried = search(errors, [end for end in ends if end < len(errors)])
    first = next((number for number, error in enumerate(errors) if error > LIMIT), None)
    assert tried.first_bad() == first == search(errors, []).scan()
    assert tried.monotone("relative_l2")
    passes = len(set(ends)) + 2
    assert len(tried.points) <= 2 + passes.bit_length() + len(errors).bit_length()


@given(ERRORS, ENDS)
@settings(max_examples=300, deadline=None)
def test_bisection_finds_one_that_breaks_it_whatever_the_errors(errors: list[float], ends: list[int]) -> None:
    tried = search(errors, [end for end in ends if end < len(errors)])
    found = tried.first_bad()
    if found is None:
        assert errors[-1] <= LIMIT
    else:
        assert errors[found] > LIMIT
        assert found == 0 or errors[found - 1] <= LIMIT
    scanned = search(errors, []).scan()
    assert scanned == next((number for number, error in enumerate(errors) if error > LIMIT), None)


@pytest.mark.parametrize(
    ("errors", "monotone"),
    [
        ([0.0, 0.2, 0.2, 0.9], True),
        ([0.0, 0.20001, 0.2, 0.9], True),  # rounding
        ([0.0, 0.9, 0.1, 0.9], False),
        ([0.0, math.inf, 0.1, 0.9], False),
        ([0.0, 0.1, math.inf], True),
    ],
)
def test_an_error_that_falls_again_is_seen(errors: list[float], monotone: bool) -> None:
    tried = search(errors, [])
    for number in range(len(errors)):
        tried.at(number)
    assert tried.monotone("relative_l2") is monotone


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [("cosine", 0.75, 0.25), ("relative_l2", 0.3, 0.3), ("max_abs", 2.0, 2.0), ("sqnr_db", 40.0, -40.0)],
)
def test_badness_grows_with_the_error(metric: str, value: float, expected: float) -> None:
    better = OutputNumerics(output="a", finite=True, **{metric: value})
    assert badness([better], metric) == expected
    assert badness([better, line(math.inf)], "cosine") == math.inf
    assert badness([OutputNumerics(output="a", finite=True)], "sqnr_db") == -math.inf  # equal
