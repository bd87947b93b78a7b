"""How far values are from what was expected: one definition of each metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from llmc.compiler.recipe.sections import LOGITS_METRICS, METRICS, Metric
from llmc.compiler.report import OutputNumerics
from llmc.passes.base import LlmcError
from llmc.passes.graph import Array

CHUNK = 1 << 20
"""Values compared at a time, and at least a row."""


@dataclass
class _Sums:
    """One output's running sums over samples, in float64."""

    max_abs: float = 0.0
    difference: float = 0.0
    signal: float = 0.0
    cosines: float = 0.0
    rows: int = 0
    finite: bool = True
    logits: LogitsSums | None = None
    """Where metrics of logits are measured too."""
    custom: dict[str, list[float]] = field(default_factory=dict)

    def add(self, expected: Array, found: Array) -> None:
        """Rows along the last axis are added some at a time: large values are never in float64 as a whole."""
        width = _row_width(expected)
        rows = max(1, CHUNK // width)
        old, new = expected.reshape(-1, width), found.reshape(-1, width)
        for begin in range(0, len(old), rows):
            self._add_rows(old[begin : begin + rows], new[begin : begin + rows])

    def _add_rows(self, expected: Array, found: Array) -> None:
        wide = expected.astype(np.float64)
        equal = np.array_equal(expected, found)
        narrow = wide if equal else found.astype(np.float64)
        difference = np.zeros(1) if equal else _difference(wide, narrow)
        signal, squared = float(np.vdot(wide, wide)), float(np.vdot(difference, difference))
        if not math.isfinite(signal + squared):  # NaN and infinities count for nothing but `finite`
            self.finite &= bool(np.isfinite(narrow[np.isfinite(wide)]).all())
            same = (wide == narrow) | (np.isnan(wide) & np.isnan(narrow))  # equal infinities differ by nothing
            difference = np.where(same, 0.0, _difference(wide, narrow))
            wide, narrow, difference = (
                np.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0) for v in (wide, narrow, difference)
            )
            signal, squared = float(np.vdot(wide, wide)), float(np.vdot(difference, difference))
        if self.logits is not None and wide.shape[1] > 1:
            self.logits.add(wide, narrow)
        self.signal += signal
        self.difference += squared
        rows = len(wide)
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
            custom={name: sum(values) / len(values) for name, values in self.custom.items()},
            finite=self.finite,
            **(self.logits.means() if self.logits is not None else {}),
        )


@dataclass
class LogitsSums:
    """Running sums of what compares rows of logits."""

    top1: float = 0.0
    top5: float = 0.0
    kl: float = 0.0
    rows: int = 0

    def add(self, expected: Array, found: Array) -> None:
        """Rows of logits [rows, classes], finite, in float64."""
        self.rows += len(expected)
        self.top1 += float((expected.argmax(axis=1) == found.argmax(axis=1)).sum())
        count = min(5, expected.shape[1])
        largest = [np.argsort(-values, axis=1, kind="stable")[:, :count] for values in (expected, found)]
        self.top5 += float((largest[0][:, :, None] == largest[1][:, None, :]).sum()) / count
        log_p, log_q = (log_softmax(values) for values in (expected, found))
        self.kl += float((np.exp(log_p) * (log_p - log_q)).sum())

    def means(self) -> dict[str, float]:
        """Each over all rows; none where there was no row."""
        return {m: getattr(self, m) / self.rows for m in LOGITS_METRICS} if self.rows else {}


def log_softmax(logits: Array) -> Array:
    """Logarithms of the probabilities that rows of logits stand for: [rows, classes], finite, in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def row_cosines(expected: Array, found: Array) -> Array:
    """Cosine similarity of the rows along the last axis (of the whole, where that axis has one element): [rows].

    Two rows of zeros are equal: 1. One row of zeros is no direction at all: 0.
    """
    a, b = expected.reshape(-1, _row_width(expected)), found.reshape(-1, _row_width(expected))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = (np.abs(a).max(axis=1, initial=0) == 0) & (np.abs(b).max(axis=1, initial=0) == 0)
    products: Array = (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    return np.where(both_zero, 1.0, np.clip(products, -1.0, 1.0))


def _difference(expected: Array, found: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        result: Array = found - expected
    return result


def _row_width(values: Array) -> int:
    return values.shape[-1] if values.ndim and values.shape[-1] > 1 else max(values.size, 1)


Custom = Mapping[str, Callable[[Array, Array], float]]
"""Name → a metric of the user's own, of one output of one sample."""


def compare(
    pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]],
    metrics: Collection[Metric] = METRICS,
    custom: Custom = MappingProxyType({}),
) -> list[OutputNumerics]:
    """The chosen metrics per output over (expected, found) pairs of output values, one pair a sample.

    Those of logits are measured besides where an output is called logits. Raises LlmcError where outputs do not fit.
    """
    sums: dict[str, _Sums] = {}
    for expected, found in pairs:
        for name, value in expected.items():
            if name not in found:
                raise LlmcError(f"output '{name}' of the reference is not an output of the graph")
            if value.shape != found[name].shape:
                raise LlmcError(f"output '{name}' has shape {found[name].shape}, the reference {value.shape}")
            if value.dtype.kind in "fiubV":
                wanted = "logits" in name.lower() or not set(LOGITS_METRICS).isdisjoint(metrics)
                held = sums.setdefault(name, _Sums(logits=LogitsSums() if wanted else None))
                held.add(value, found[name])
                for label, measure in custom.items():
                    held.custom.setdefault(label, []).append(_measured(label, measure, value, found[name]))
    return [_chosen(total.numerics(name), metrics) for name, total in sums.items()]


def _chosen(numerics: OutputNumerics, metrics: Collection[Metric]) -> OutputNumerics:
    """Without what nobody asked for."""
    kept = {*metrics, *(LOGITS_METRICS if "logits" in numerics.output.lower() else ())}
    unasked: dict[str, object] = {m: None for m in (*METRICS, *LOGITS_METRICS) if m not in kept}
    return numerics.model_copy(update=unasked)


def _measured(name: str, measure: Callable[[Array, Array], float], expected: Array, found: Array) -> float:
    try:
        return float(measure(expected, found))
    except Exception as error:
        raise LlmcError(f"verify.custom.{name} failed: {type(error).__name__}: {error}") from error
