"""How far values are from what was expected: one definition of each metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from llmc.compiler.recipe.sections import METRICS, Metric
from llmc.compiler.report import OutputNumerics
from llmc.passes.base import LlmcError
from llmc.passes.graph import Array


@dataclass
class _Sums:
    """One output's running sums over samples, in float64."""

    max_abs: float = 0.0
    difference: float = 0.0
    signal: float = 0.0
    cosines: float = 0.0
    rows: int = 0
    finite: bool = True

    def add(self, expected: Array, found: Array) -> None:
        wide, narrow = expected.astype(np.float64), found.astype(np.float64)
        signal = float(np.vdot(wide, wide))
        with np.errstate(invalid="ignore", over="ignore"):
            difference = narrow - wide
            squared = float(np.vdot(difference, difference))
        if not math.isfinite(signal + squared):  # NaN and infinities count for nothing but `finite`
            self.finite &= bool(np.isfinite(narrow[np.isfinite(wide)]).all())
            same = (wide == narrow) | (np.isnan(wide) & np.isnan(narrow))  # equal infinities differ by nothing
            difference = np.where(same, 0.0, difference)
            wide, narrow, difference = (
                np.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0) for v in (wide, narrow, difference)
            )
            signal, squared = float(np.vdot(wide, wide)), float(np.vdot(difference, difference))
        self.signal += signal
        self.difference += squared
        rows = wide.size // _row_width(wide)
        self.rows += rows
        if squared:
            self.max_abs = max(self.max_abs, float(np.abs(difference).max()))
            self.cosines += float(row_cosines(wide, narrow).sum())
        else:
            self.cosines += rows

    def numerics(self, output: str) -> OutputNumerics:
        relative = math.sqrt(self.difference / self.signal) if self.signal else (math.inf if self.difference else 0.0)
        return OutputNumerics(
            output=output,
            max_abs=self.max_abs if self.finite else math.inf,
            relative_l2=relative if self.finite else math.inf,
            cosine=self.cosines / self.rows if self.rows and self.finite else (0.0 if self.rows else 1.0),
            sqnr_db=-20 * math.log10(relative) if self.finite and 0 < relative < math.inf else None,
            finite=self.finite,
        )


def row_cosines(expected: Array, found: Array) -> Array:
    """Cosine similarity of the rows along the last axis (of the whole, where that axis has one element): [rows].

    Two rows of zeros are equal: 1. One row of zeros is no direction at all: 0.
    """
    a, b = expected.reshape(-1, _row_width(expected)), found.reshape(-1, _row_width(expected))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = (np.abs(a).max(axis=1, initial=0) == 0) & (np.abs(b).max(axis=1, initial=0) == 0)
    products: Array = (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    return np.where(both_zero, 1.0, np.clip(products, -1.0, 1.0))


def _row_width(values: Array) -> int:
    return values.shape[-1] if values.ndim and values.shape[-1] > 1 else max(values.size, 1)


def compare(
    pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]], metrics: Iterable[Metric] = METRICS
) -> list[OutputNumerics]:
    """The chosen metrics per output over (expected, found) pairs of output values, one pair a sample."""
    sums: dict[str, _Sums] = {}
    for expected, found in pairs:
        for name, value in expected.items():
            if name not in found:
                raise LlmcError(f"output '{name}' of the reference is not an output of the graph")
            if value.shape != found[name].shape:
                raise LlmcError(f"output '{name}' has shape {found[name].shape}, the reference {value.shape}")
            if value.dtype.kind in "fiubV":
                sums.setdefault(name, _Sums()).add(value, found[name])
    unasked: dict[str, object] = dict.fromkeys(metric for metric in METRICS if metric not in metrics)
    return [total.numerics(name).model_copy(update=unasked) for name, total in sums.items()]
