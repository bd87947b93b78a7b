"""How far a graph's outputs are from the reference, and whether a budget allows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.compiler.loaders import Feeds
from llmc.compiler.recipe.sections import AT_LEAST, METRICS, Metric
from llmc.compiler.report import OutputNumerics
from llmc.compiler.session import Session
from llmc.passes.base import LlmcError
from llmc.passes.graph import Array, Graph


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
        self.finite &= bool(np.isfinite(narrow[np.isfinite(wide)]).all())
        same = (wide == narrow) | (np.isnan(wide) & np.isnan(narrow))  # equal infinities differ by nothing
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.where(same, 0.0, narrow - wide)
        wide, narrow, difference = (
            np.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0) for v in (wide, narrow, difference)
        )
        self.max_abs = max(self.max_abs, float(np.abs(difference).max(initial=0.0)))
        self.difference += float((difference**2).sum())
        self.signal += float((wide**2).sum())
        cosines = row_cosines(wide, narrow)
        self.cosines += float(cosines.sum())
        self.rows += cosines.size

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
    width = expected.shape[-1] if expected.ndim and expected.shape[-1] > 1 else max(expected.size, 1)
    a, b = expected.reshape(-1, width), found.reshape(-1, width)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = (np.abs(a).max(axis=1, initial=0) == 0) & (np.abs(b).max(axis=1, initial=0) == 0)
    products: Array = (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    return np.where(both_zero, 1.0, np.clip(products, -1.0, 1.0))


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


def breaches(numerics: Sequence[OutputNumerics], budgets: Mapping[str, float]) -> list[str]:
    """One line for each output and metric that is outside its budget; NaN and infinity are outside of any."""
    lines = []
    for line in numerics:
        if not line.finite:
            lines.append(f"output '{line.output}' has NaN or infinity where the reference has none")
            continue
        for metric, bound in budgets.items():
            value = getattr(line, metric)
            if value is None:  # sqnr_db of equal outputs
                continue
            if metric in AT_LEAST and not value >= bound:
                lines.append(f"output '{line.output}': {metric} is {value:.6g}, the budget asks for at least {bound:g}")
            if metric not in AT_LEAST and not value <= bound:
                lines.append(f"output '{line.output}': {metric} is {value:.6g}, the budget allows at most {bound:g}")
    return lines


@dataclass
class Verifier:
    """Compares graphs with a reference on fixed samples; the reference's outputs are computed once."""

    samples: Sequence[Feeds]
    expected: Sequence[Mapping[str, Array]]
    metrics: Sequence[Metric] = METRICS

    @classmethod
    def against(
        cls,
        reference: Callable[[Feeds], Mapping[str, Array]],
        samples: Iterable[Feeds],
        metrics: Sequence[Metric] = METRICS,
    ) -> Verifier:
        """A verifier whose truth is what `reference` makes of the samples."""
        held = list(samples)
        return cls(held, [reference(sample) for sample in held], metrics)

    def measure(self, graph: Graph) -> list[OutputNumerics]:
        """Run `graph` over the samples (ONNX Runtime, optimizations off) and compare every output."""
        session = Session(graph)
        return compare(zip(self.expected, map(session.run, self.samples), strict=True), self.metrics)


def verify(graph: Graph, reference: Graph, samples: Iterable[Feeds]) -> list[OutputNumerics]:
    """How far `graph` is from `reference` on `samples`, output by output."""
    return Verifier.against(Session(reference).run, samples).measure(graph)
