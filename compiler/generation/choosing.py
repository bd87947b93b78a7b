"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from llmc.passes.graph import Array

Choose = Callable[[Array], Array]
"""Logits [batch, vocabulary] → token ids [batch]."""


def greedy(logits: Array) -> Array:
    """The likeliest token of each row: [batch, vocabulary] → int64 [batch]."""
    tokens: Array = logits.argmax(axis=-1).astype(np.int64)
    return tokens


def without(choose: Choose, never: Collection[int], not_first: Collection[int]) -> Choose:
    """`choose` for one answer, among all tokens but `never`, and the first time but `not_first` either."""
    barred = sorted({*never, *not_first})

    def chosen(logits: Array) -> Array:
        nonlocal barred
        if barred:
            logits = logits.copy()
            logits[:, barred] = -np.inf
            barred = sorted(never)
        return choose(logits)

    return chosen


def sampler(temperature: float, top_k: int | None, top_p: float, seed: int) -> Choose:
    """Draws tokens: among the `top_k` likeliest, of those the fewest that `top_p` of the probability falls on.

    As Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020). The same seed gives the same tokens.
    """
    rng = np.random.default_rng(seed)

    def choose(logits: Array) -> Array:
        order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
        scaled = np.take_along_axis(logits, order, axis=-1).astype(np.float64) / temperature
        probabilities = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
        kept = probabilities.cumsum(axis=-1) - probabilities < top_p
        kept[:, 0] = True
        probabilities = np.where(kept, probabilities, 0.0)
        cumulative = probabilities.cumsum(axis=-1)
        drawn = rng.random((len(logits), 1)) * cumulative[:, -1:]
        picked = (cumulative <= drawn).sum(axis=-1, keepdims=True)
        return np.take_along_axis(order, picked, axis=-1)[:, 0].astype(np.int64)

    return choose
