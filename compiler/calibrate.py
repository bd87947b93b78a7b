"""What the tensors of a graph look like on calibration data: statistics that stream, in one pass over the samples.

Memory is one histogram a tensor and the tensors of one sample, however many and however large the samples are.
A statistic depends on the values alone: not on their order, nor on how they were cut into samples.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import numpy as np

from llmc.compiler.cache.keys import code_digest, environment
from llmc.compiler.cache.memory import NOTHING, Memory
from llmc.compiler.cache.statistics import recall
from llmc.compiler.calibration_file import Statistics
from llmc.compiler.errors import LlmcError
from llmc.compiler.session import Session
from llmc.passes.base import Clipped, Measured, Spread
from llmc.passes.graph import Array, Graph, shape_of
from llmc.passes.precision.levels import LEVELS

MASK = "attention_mask"
"""The input that says which tokens are padding."""
BINS = 4096
"""Of a histogram; a power of two. The largest value stands in the upper half, so 16 bins or more make one step."""
MIN_EXPONENT = -100
"""Histograms reach at least 2**-100, so that no product of a float32 and their bin width is subnormal."""
BLOCK = 1 << 18
"""Values binned at a time: the temporaries stay in cache, and small beside any sample."""
CANDIDATES = 256
"""Clipping points that the searches try, evenly spaced up to the largest value."""
BARS = 48
"""Bins of the histograms that are handed on, at most."""
EMPTY = 1e-4
"""Values that a level with none counts as, where the clipped tail falls into it: else its divergence is infinite."""


class Histogram:
    """Magnitudes of one tensor, counted in `BINS` equal bins over [0, 2**exponent).

    The range is the smallest power of two above every value. When it doubles, neighbouring bins merge; as bin
    widths are powers of two, that gives exactly the counts that the wider bins would have had from the start.
    Exact zeros are counted apart: every scale quantizes them without error.
    """

    def __init__(self) -> None:
        self.counts: Array = np.zeros(BINS, np.int64)
        self.zeros = 0
        self.exponent = MIN_EXPONENT
        self.amax = 0.0

    def add(self, values: Array) -> None:
        """Count `values` (finite, any float dtype, any shape)."""
        flat = values.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            self._add_block(np.abs(flat[start : start + BLOCK]).astype(np.float32, copy=False))

    def _add_block(self, magnitudes: Array) -> None:
        peak = float(magnitudes.max())
        zeros = magnitudes.size - int(np.count_nonzero(magnitudes))
        self.amax = max(self.amax, peak)
        if peak:  # frexp(0) has the exponent 0, which is no small one
            self._reach(math.frexp(peak)[1])
        positions = (magnitudes * np.float32(1 / self.width)).astype(np.intp)
        self.counts += np.bincount(positions, minlength=BINS)
        self.counts[0] -= zeros
        self.zeros += zeros

    def _reach(self, exponent: int) -> None:
        while self.exponent < exponent:
            self.counts[: BINS // 2] = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[BINS // 2 :] = 0
            self.exponent += 1

    @property
    def width(self) -> float:
        """Of one bin: a power of two."""
        return math.ldexp(1.0 / BINS, self.exponent)

    @property
    def used(self) -> int:
        """How many bins reach from 0 to the largest value."""
        return int(self.amax / self.width) + 1

    def above(self, clip: float) -> float:
        """How many values are larger than `clip`; those in its own bin count as spread evenly over that."""
        if clip >= self.amax:
            return 0.0
        bin_ = int(clip / self.width)
        low, high = bin_ * self.width, min((bin_ + 1) * self.width, self.amax)
        return float(self.counts[bin_ + 1 :].sum() + self.counts[bin_] * (high - clip) / (high - low))

    def spread(self, clip: float) -> Spread:
        """All of it in at most `BARS` bins, and the share that is larger than `clip`."""
        values, merged = self.zeros + int(self.counts.sum()), math.ceil(self.used / BARS)
        counts = np.add.reduceat(self.counts[: self.used], range(0, self.used, merged))
        saturated = self.above(clip) / values if values else 0.0
        return Spread(values, self.zeros, saturated, merged * self.width, tuple(map(int, counts)))

    def measured(self) -> Measured:
        """All of it, as arrays."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def of(cls, measured: Measured) -> Histogram:
        """What `measured` was made of."""
        histogram = cls()
        histogram.counts = measured["counts"]
        histogram.zeros, histogram.exponent = int(measured["zeros"]), int(measured["exponent"])
        histogram.amax = float(measured["amax"])
        return histogram


# Where to clip: each method takes a histogram with at least one value above 0, and gives a magnitude


def minmax(histogram: Histogram) -> float:
    """The largest magnitude: nothing is clipped."""
    return histogram.amax


def percentile(histogram: Histogram, percent: float) -> float:
    """The magnitude that `percent` of all values (zeros too) do not exceed, to within one bin."""
    wanted = percent / 100 * (histogram.zeros + int(histogram.counts.sum())) - histogram.zeros
    reached = np.cumsum(histogram.counts)
    bin_ = int(np.searchsorted(reached, max(wanted, 1.0)))
    return min((bin_ + 1) * histogram.width, histogram.amax)


def mse(histogram: Histogram) -> float:
    """The clipping point of the least mean squared error of rounding and clipping, with values uniform in a bin.

    The error over a bin is an exact integral, so bins wider than a quantization step do no harm.
    """
    counts = histogram.counts[: histogram.used].astype(np.float64)
    edges = np.arange(histogram.used + 1) * histogram.width
    points = _candidates(histogram, least=histogram.amax / CANDIDATES)
    errors = [float(counts @ np.diff(_integrated_squared_error(edges, point))) for point in points]
    return points[int(np.argmin(errors))]


def _integrated_squared_error(edges: Array, clip: float) -> Array:
    """∫₀ˣ (t - quantized(t))² dt at every x of `edges`, for a quantizer of `LEVELS` steps up to `clip`."""
    step = clip / LEVELS
    level = np.minimum(np.rint(edges / step), LEVELS)
    integral: Array = level * (step**3 / 12) + (edges - level * step) ** 3 / 3
    return integral


def entropy(histogram: Histogram) -> float:
    """The clipping point whose quantized distribution has the least Kullback-Leibler divergence from the original.

    As Migacz, "8-bit inference with TensorRT" (2017): the clipped tail is added to the last bin of the original
    only. Levels are the quantizer's own (half a step for 0, one step for each other), zeros are left out.
    """
    counts = histogram.counts[: histogram.used].astype(np.float64)
    points = _candidates(histogram, least=min(LEVELS * histogram.width, histogram.amax))
    divergences = [_divergence(counts, math.ceil(point / histogram.width)) for point in points]
    return points[int(np.argmin(divergences))]


def _divergence(counts: Array, kept: int) -> float:
    """KL divergence, in nats, of the first `kept` bins quantized to `LEVELS` levels from all bins clipped there."""
    inside = counts[:kept]
    original = inside.copy()
    original[-1] += counts[kept:].sum()
    occupied = original > 0
    level = np.rint((np.arange(len(inside)) + 0.5) * (LEVELS / len(inside))).astype(np.intp)
    mass = np.bincount(level, weights=inside, minlength=LEVELS + 1)
    sharing = np.bincount(level, weights=occupied, minlength=LEVELS + 1)
    quantized = np.maximum(mass, EMPTY)[level[occupied]] / sharing[level[occupied]]
    p = original[occupied] / original.sum()
    q = quantized / quantized.sum()
    return float(p @ np.log(p / q))


def _candidates(histogram: Histogram, least: float) -> list[float]:
    return [float(point) for point in np.linspace(histogram.amax, least, CANDIDATES)]


class SampledActivations:
    """Statistics of a graph's tensors over samples, taken in ONNX Runtime. Implements `passes.base.Activations`.

    `samples` is iterated anew for every question; `source` says in messages where they came from. What the user
    should know about the data behind the answers collects in `warnings`.
    """

    def __init__(
        self,
        samples: Iterable[Mapping[str, Array]],
        source: str = "the calibration data",
        random: bool = False,
        digest: str | None = None,
        known: Statistics | None = None,
        memory: Memory = NOTHING,
        held_out: SampledActivations | None = None,
    ) -> None:
        self.held_out = held_out
        """Of samples that none of these statistics come from."""
        self.known = known
        """What clipping points are taken from, where an earlier compile has measured them: no sample is run."""
        self.calibrated: dict[str, Clipped] = {}
        """Tensor → the last answer of `amax`."""
        self.spreads: dict[str, Spread] = {}
        """Tensor → its values about that answer, where it is no earlier compile's."""
        self.digest = digest
        """Of all that the samples are made of; None where that is not known, and nothing of it can be remembered."""
        self.samples = samples
        self.source = source
        self.random = random
        """Whether the samples were made up, where real ones would count: whoever uses them is warned."""
        self.warnings: list[str] = []
        self.memory = memory
        """Where statistics of earlier compiles are found, and those of this one are kept."""

    def amax(
        self, graph: Graph, tensors: Sequence[str], *, method: str, percentile: float, samples: int
    ) -> dict[str, float]:
        """For each tensor the magnitude that a symmetric quantizer should clip at; 0 where it is 0 throughout.

        Uses the first `samples` samples, or all where there are fewer (and says so in `warnings`). Raises
        LlmcError where there is no sample, or where a tensor is NaN or infinite on one, and where earlier statistics
        are to answer and cannot.
        """
        percentile = percentile if method == "percentile" else 100.0
        answer = self.known.answer if self.known else partial(self._measure, graph)
        found = answer(tensors, method, percentile, samples)
        self.calibrated |= found
        return {tensor: clipped.clip for tensor, clipped in found.items()}

    def _measure(
        self, graph: Graph, tensors: Sequence[str], method: str, percentile: float, samples: int
    ) -> dict[str, Clipped]:
        clip = _clipping(method, percentile)
        wanted = dict.fromkeys(tensors, "histogram")
        found = self.recall(graph, __name__, wanted, samples, partial(self._histograms, graph, samples))
        numbers = {tensor: int(measured["samples"]) for tensor, measured in found.items()}
        fewest = min(numbers.values(), default=samples)
        if fewest < samples:
            self._warn(f"calibration asked for {samples} samples, {self.source} has {fewest}: used them all")
        histograms = {tensor: Histogram.of(measured) for tensor, measured in found.items()}
        clips = {tensor: clip(h) if h.amax else 0.0 for tensor, h in histograms.items()}
        self.spreads |= {tensor: h.spread(clips[tensor]) for tensor, h in histograms.items()}
        return {
            tensor: Clipped(method, percentile, numbers[tensor], h.amax, clips[tensor])
            for tensor, h in histograms.items()
        }

    def _histograms(self, graph: Graph, samples: int, tensors: Sequence[str]) -> dict[str, Measured]:
        histograms = {tensor: Histogram() for tensor in tensors}
        number = 0
        for number, values in self.stream(graph, tensors, samples):
            for tensor, value in values.items():
                if not np.isfinite(value).all():
                    raise LlmcError(
                        f"calibration: tensor '{tensor}' is NaN or infinite on sample {number} of {self.source}; "
                        "remove that sample, or exclude the nodes that use the tensor"
                    )
                histograms[tensor].add(value)
        return {tensor: {**h.measured(), "samples": np.asarray(number)} for tensor, h in histograms.items()}

    def absolute_maximum(self, graph: Graph, tensors: Sequence[str]) -> dict[str, float]:
        """The largest magnitude of each tensor over all samples; infinity or NaN where it gets there."""

        def measure(names: Sequence[str]) -> dict[str, Measured]:
            peaks = {name: np.zeros((), np.float64) for name in names}
            for _, values, _ in self._run(graph, names, None):
                for tensor, value in values.items():
                    peaks[tensor] = np.asarray(np.maximum(peaks[tensor], np.max(np.abs(value), initial=0.0)))
            return {name: {"peak": peak} for name, peak in peaks.items()}

        found = self.recall(graph, __name__, dict.fromkeys(tensors, "peak"), None, measure)
        return {tensor: float(measured["peak"]) for tensor, measured in found.items()}

    def recall(
        self,
        graph: Graph,
        kind: str,
        wanted: Mapping[str, object],
        samples: int | None,
        make: Callable[[Sequence[str]], Mapping[str, Measured]],
    ) -> Mapping[str, Measured]:
        """As `passes.base.Activations`; kept where the cache is in use, and the digest of the data known."""
        self._tell()
        if self.memory.store is None or not self.digest:
            return make(list(wanted))
        code = (code_digest(kind), code_digest(__name__), environment())
        return recall(self.memory, (kind, self.memory.digest(graph), self.digest, samples, *code), wanted, make)

    def stream(
        self, graph: Graph, tensors: Sequence[str], samples: int | None = None
    ) -> Iterator[tuple[int, dict[str, Array]]]:
        """Sample by sample (numbered from 1) the values of `tensors`; nothing of a sample outlives its turn.

        Where a sample's attention_mask [batch, sequence] leaves tokens out, so do tensors of that batch and sequence:
        [batch, sequence, ...] becomes [tokens, ...]. At most the first `samples` samples. Raises LlmcError where there
        is none.
        """
        axes = padded_axes(graph, tensors)
        for number, values, mask in self._run(graph, tensors, samples):
            yield number, {name: without_padding(value, mask, axes.get(name)) for name, value in values.items()}

    def _run(
        self, graph: Graph, tensors: Sequence[str], samples: int | None
    ) -> Iterator[tuple[int, dict[str, Array], Array | None]]:
        """Sample by sample the values of `tensors`, padding and all, and the attention mask."""
        self._tell()
        inputs = {tensor.name for tensor in graph.inputs}
        computed = [tensor for tensor in tensors if tensor not in inputs]
        session = Session(graph, computed)
        taken: deque[Mapping[str, Array]] = deque()

        def ahead() -> Iterator[Mapping[str, Array]]:
            for feeds in islice(self.samples, samples):
                taken.append(feeds)
                yield feeds

        number = 0
        made = session.run_each(ahead(), computed) if computed else ({} for _ in ahead())
        for number, values in enumerate(made, 1):
            feeds = taken.popleft()
            given = {tensor: feeds[tensor] for tensor in tensors if tensor in inputs}
            yield number, {**given, **values}, feeds.get(MASK)
        if number == 0:
            raise LlmcError(f"calibration: {self.source} has no samples; give some with --calibration DATA")

    def _tell(self) -> None:
        if self.random:
            self._warn(
                "calibrated on RANDOM inputs: the scales fit no real data, accuracy will suffer; "
                "give real samples with --calibration DATA"
            )

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)


def padded_axes(graph: Graph, tensors: Sequence[str]) -> dict[str, int]:
    """Tensor → the axis of its tokens, where axis 0 and that one have the names of the attention mask's dimensions."""
    names = next((shape_of(tensor) for tensor in graph.inputs if tensor.name == MASK), None)
    if names is None or len(names) != 2 or not all(isinstance(name, str) for name in names):
        return {}
    known, found = graph.tensors(), {}
    for name in tensors:
        shape = shape_of(known[name]) if name in known else None
        if shape is not None and len(shape) > 2 and shape[0] == names[0] and names[1] in shape[1:]:
            found[name] = shape.index(names[1], 1)
    return found


def without_padding(value: Array, mask: Array | None, axis: int | None) -> Array:
    """The values of those tokens, along axes 0 and `axis`, that the mask [batch, sequence] keeps: [tokens, ...].

    Where the tokens stand on the last axis, they stay there: [..., tokens].
    """
    if mask is None or axis is None or mask.all() or (value.shape[0], value.shape[axis]) != mask.shape:
        return value
    kept: Array = np.moveaxis(value, axis, 1)[mask.astype(bool)]
    return np.moveaxis(kept, 0, -1) if axis == value.ndim - 1 else kept


def _clipping(method: str, percent: float) -> Callable[[Histogram], float]:
    if method == "percentile":
        return lambda histogram: percentile(histogram, percent)
    return {"minmax": minmax, "mse": mse, "entropy": entropy}[method]
