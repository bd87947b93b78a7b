"""Tokens drawn from logits, against the probabilities that NumPy computes."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.generation.choosing import greedy, sampler
from llmc.passes.graph import Array

PROBABILITIES = np.array([0.1, 0.5, 0.15, 0.25])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
DRAWS = 20_000


def frequencies(temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Array:
    choose = sampler(temperature, top_k, top_p, seed=1)
    return np.bincount(choose(np.tile(LOGITS, (DRAWS, 1))), minlength=4) / DRAWS


def test_greedy_takes_the_likeliest() -> None:
    np.testing.assert_array_equal(greedy(np.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])), [1, 0])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [0, 5 / 7.5, 0, 2.5 / 7.5]),
        ({"top_p": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(settings: dict[str, float], expected: Array) -> None:
    # Five standard deviations of a frequency among 20,000 draws: 5 * sqrt(0.25 / 20000)
    np.testing.assert_allclose(frequencies(**settings), expected, atol=0.018)


def test_the_same_seed_draws_the_same() -> None:
    rows = np.tile(LOGITS, (50, 1))
    np.testing.assert_array_equal(sampler(1.0, None, 1.0, 3)(rows), sampler(1.0, None, 1.0, 3)(rows))
    assert (sampler(1.0, None, 1.0, 3)(rows) != sampler(1.0, None, 1.0, 4)(rows)).any()
