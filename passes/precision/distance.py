"""How far the outputs of a graph have moved, over samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from llmc.passes.graph import Array


@dataclass
class Distance:
    """Running sums over the samples of the outputs that count."""

    cosines: float = 0.0
    rows: int = 0
    difference: float = 0.0
    signal: float = 0.0

    def add(self, expected: Array, found: Array) -> None:
        """One output of one sample, both of the same shape."""
        wide, narrow = expected.astype(np.float64), found.astype(np.float64)
        cosines = row_cosines(wide, narrow)
        self.cosines += float(cosines.sum())
        self.rows += cosines.size
        self.difference += float(((narrow - wide) ** 2).sum())
        self.signal += float((wide**2).sum())

    @property
    def cosine(self) -> float:
        """Mean cosine similarity of rows along the last axis."""
        return self.cosines / self.rows if self.rows else 1.0

    @property
    def relative_l2(self) -> float:
        """L2 norm of the difference over the L2 norm of what was expected."""
        return math.sqrt(self.difference / self.signal) if self.signal else math.inf if self.difference else 0.0


def row_cosines(expected: Array, found: Array) -> Array:
    """Cosine similarity of the rows along the last axis (of the whole, where that axis has one element): [rows].

    Two rows of zeros are equal: 1. One row of zeros is no direction at all: 0; nor is one with NaN or infinity.
    """
    width = expected.shape[-1] if expected.ndim and expected.shape[-1] > 1 else max(expected.size, 1)
    a, b = expected.reshape(-1, width), found.reshape(-1, width)
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        both_zero = (np.abs(a).max(axis=1, initial=0) == 0) & (np.abs(b).max(axis=1, initial=0) == 0)
        products: Array = (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    return np.where(both_zero, 1.0, np.nan_to_num(np.clip(products, -1.0, 1.0), nan=0.0))


def distance(pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> Distance:
    """Over (expected, found) pairs of floating-point outputs, one pair a sample."""
    total = Distance()
    for expected, found in pairs:
        for name, value in expected.items():
            if value.dtype.kind in "fV":
                total.add(value, found[name])
    return total
