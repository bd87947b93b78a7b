"""Mixed precision: the cheapest one for each layer with which the whole graph stays within a budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from math import prod
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmc.passes.base import Activations, Context, LlmcError, Measured, Need, Pass, PassResult, Safety, Skip, TradeOff
from llmc.passes.graph import Array, Graph, Node, constant_bytes, constants, copy_graph
from llmc.passes.precision.calibration import Clipping, Judging
from llmc.passes.precision.confidence import LEAST, Judged, judged
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.precision.distance import distance
from llmc.passes.precision.quantize_int8 import QuantizeInt8
from llmc.passes.precision.quantize_products import Operator
from llmc.passes.precision.selection import SelectivePass
from llmc.passes.precision.smooth_quant import uncorrected_shift

Precision = Literal["int8", "fp16", "fp32"]
TIME = {"int8": 0.25, "fp16": 0.5, "fp32": 1.0}
"""What a product takes in each precision, relative to float32: tensor cores double their rate with each halving of the
width (NVIDIA, "Ampere GA102 GPU Architecture", 2020)."""
RANKED = 32
"""Samples by which layers are put in order, at most: what is chosen is judged on all."""
PUT_BACK = 8
"""Layers that are tried in INT8 once more, one after the other, after the search has left them out."""


class Budget(BaseModel):
    """What must hold of the graph's outputs, compared with those before this pass, with 95 % confidence."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    cosine: float | None = Field(None, ge=-1, le=1, description="Least mean cosine similarity of rows.")
    relative_l2: float | None = Field(None, ge=0, description="Largest L2 norm of the difference over the output's.")

    @model_validator(mode="after")
    def _asks_for_something(self) -> Budget:
        if self.cosine is None and self.relative_l2 is None:
            raise ValueError("needs cosine or relative_l2")
        return self

    def holds(self, found: Judged) -> bool:
        """Whether `found` is within the budget; NaN is not."""
        return (self.cosine is None or found.cosine_bound >= self.cosine) and (
            self.relative_l2 is None or found.relative_l2_bound <= self.relative_l2
        )


class SearchPrecision(SelectivePass):
    """Gives each layer the cheapest precision with which the graph's outputs stay within a budget.

    Every product with constant weights is put in INT8 alone and the error at the graph's outputs measured. Layers are
    then left out, those first that cost most error for what they save, as few as the budget allows: their number is
    found by bisection, with the whole graph measured each time, and some are tried once more at the end. What is not
    INT8 becomes FP16 where `search` has it (`convert-fp16` keeps in FP32 what FP16 cannot hold), else it stays FP32.
    The same data gives the same answer. The report shows accuracy against bytes and estimated time for every assignment
    that was measured.

    Samples that calibrate are quantized better than others, and few samples are a matter of luck. So the budget is
    judged on samples that do not calibrate, and holds where the mean keeps to it with 95 % confidence, as the spread
    between samples tells: it is a statement about all data like `judge.data`, and about no other. Where that names
    nothing, it is what follows the calibration samples; passes before this one should not have calibrated on it.

    **Safety:** lossy, within the budget, on average over data like that it is judged on.

    Source: Wu et al., "Integer Quantization for Deep Learning Inference" (2020), section 5.2, partial quantization;
    Cochran, "Sampling Techniques" (1977), chapter 6, and Hall, "On the Removal of Skewness by Transformation" (1992),
    for the confidence.
    """

    after: ClassVar[tuple[str, ...]] = ("fold-constants",)
    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    safety: ClassVar[Safety] = "lossy"

    search: list[Precision] = Field(["int8", "fp16", "fp32"], min_length=2, description="Precisions to choose from.")
    budget: Budget = Field(Budget(cosine=0.999), description="What must hold of the graph's outputs.")
    operators: list[Operator] = Field(["MatMul", "Gemm", "Conv"], description="Operators that may become INT8.")
    attention: bool = Field(False, description="Products of two activations (Q·Kᵀ and weights·V) may become INT8 too.")
    calibration: Clipping = Field(Clipping(), description="Where the scales of activations come from.")
    judge: Judging = Field(Judging(), description="Samples that the budget is judged on.")

    def conflict(self, earlier: Pass) -> str | None:
        """As `Pass.conflict`: without data no biases are corrected."""
        return uncorrected_shift(earlier) if self.calibration.scales_alone else None

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError where no assignment keeps within the budget."""
        if context.activations is None:
            raise LlmcError("search-precision needs calibration data: give some with --calibration DATA")
        search = _Search(self, graph, context.activations)
        chosen = search.best()
        if chosen is None:
            best = max(search.trade_offs, key=lambda point: point.cosine)
            raise LlmcError(
                f"search-precision: with {' and '.join(self.search)} the outputs keep to a cosine of "
                f"{best.cosine_bound:.6g} and a relative L2 of {best.relative_l2_bound:.3g} at best, with 95 % "
                f"confidence from {search.count} samples: loosen the budget, give more samples to judge on, or add "
                "fp32 to search"
            )
        result = search.apply(graph, chosen, context)
        result.frontier = search.frontier(chosen)
        return result


@dataclass(frozen=True)
class _Layer:
    """One product that may become INT8."""

    name: str
    work: int
    """Multiplications of one sample."""
    error: float = 0.0
    """1 - cosine of the graph's outputs where it alone is INT8."""


class _Search:
    def __init__(self, settings: SearchPrecision, graph: Graph, activations: Activations) -> None:
        if activations.held_out is None:
            raise LlmcError("search-precision needs samples that do not calibrate: give some with judge.data")
        self.settings, self.graph = settings, graph
        self.activations, self.remembered = activations, _Remembered(activations)
        self.held_out = activations.held_out
        self.outputs = [tensor.name for tensor in graph.outputs]
        self.truth = list(self._run(graph))
        self.count = len(self.truth)
        if self.count < LEAST:
            raise LlmcError(
                f"search-precision judges on {self.count} samples, and {LEAST} are the fewest that tell how much they "
                "vary: give more calibration data, or data of their own with judge.data"
            )
        self.trade_offs: list[TradeOff] = []
        self._measured: dict[frozenset[str], Judged] = {}
        self.layers = self._layers() if "int8" in settings.search else []
        self.work = sum(layer.work for layer in self.layers) or 1

    def best(self) -> frozenset[str] | None:
        """The layers to leave out of INT8; None where the budget breaks even with all of them left out."""
        order = [layer.name for layer in self.layers]
        if not self._holds(frozenset(order)):
            return None
        least, most = 0, len(order)
        while least < most:
            middle = (least + most) // 2
            if self._holds(frozenset(order[:middle])):
                most = middle
            else:
                least = middle + 1
        left = list(order[:most])
        for name in reversed(left[-PUT_BACK:]):
            fewer = [other for other in left if other != name]
            if self._holds(frozenset(fewer)):
                left = fewer
        return frozenset(left)

    def apply(self, graph: Graph, left: Collection[str], context: Context) -> PassResult:
        """Do it: INT8 but for `left`, then FP16 where it is searched."""
        everything = len(left) == len(self.layers)
        result = PassResult() if everything else self._quantize(graph, left, context)
        result.kept |= {
            layer.name: f"in INT8 it alone moves the outputs by 1 - cosine = {layer.error:.2g}"
            for layer in self.layers
            if layer.name in left
        }
        if "fp16" in self.settings.search:
            result = _joined(result, _converted(graph, Context(context.ledger, self.activations)))
        return result

    def frontier(self, chosen: frozenset[str]) -> list[TradeOff]:
        """Every assignment that was measured, the cheapest first."""
        size = len(self.layers) - len(chosen)
        marked = [
            replace(point, chosen=point.layers == size and point.left == tuple(sorted(chosen)))
            for point in self.trade_offs
        ]
        return sorted(marked, key=lambda point: (point.time, point.weight_bytes, point.left))

    def _layers(self) -> list[_Layer]:
        """What may become INT8, by error over work: what costs most for what it saves comes first."""
        names = list(self._quantize(copy_graph(self.graph), (), Context()).asked)
        work = self._work(names)
        layers = []
        for name in names:
            alone = copy_graph(self.graph)
            self._quantize(alone, [other for other in names if other != name], Context())
            error = 1.0 - distance(zip(self.truth[:RANKED], self._run(alone, RANKED), strict=True)).cosine
            layers.append(_Layer(name, work[name], error))
        place = {name: number for number, name in enumerate(names)}
        return sorted(layers, key=lambda layer: (-layer.error / layer.work, place[layer.name]))

    def _work(self, names: Collection[str]) -> dict[str, int]:
        """Layer → multiplications of the first sample."""
        nodes = {node.name: node for node in self.graph.nodes if node.name in names}
        tensors = list(dict.fromkeys(t for node in nodes.values() for t in (node.inputs[0].name, node.outputs[0].name)))
        wanted = [name for name in tensors if name in self.graph.tensors()]
        _, values = next(iter(self.held_out.stream(self.graph, wanted, 1)))
        return {name: _multiplications(node, values) for name, node in nodes.items()}

    def _holds(self, left: frozenset[str]) -> bool:
        if left not in self._measured:
            trial = copy_graph(self.graph)
            self.apply(trial, left, Context())
            found = judged([distance([pair]) for pair in zip(self.truth, self._run(trial), strict=True)])
            self._measured[left] = found
            self.trade_offs.append(self._trade_off(left, trial, found))
        return self.settings.budget.holds(self._measured[left])

    def _trade_off(self, left: Collection[str], trial: Graph, found: Judged) -> TradeOff:
        rest = TIME["fp16" if "fp16" in self.settings.search else "fp32"]
        time = sum(layer.work * (rest if layer.name in left else TIME["int8"]) for layer in self.layers) / self.work
        return TradeOff(
            layers=len(self.layers) - len(left),
            left=tuple(sorted(left)),
            **vars(found),
            weight_bytes=sum(constant_bytes(constant) for constant in constants(trial)),
            time=time if self.layers else rest,
        )

    def _quantize(self, graph: Graph, left: Collection[str], context: Context) -> PassResult:
        """Put in INT8 what the recipe selects, but for the nodes in `left`."""
        given = self.settings
        step = QuantizeInt8(
            operators=given.operators,
            attention=given.attention,
            calibration=given.calibration,
            include=given.include,
            exclude=[*given.exclude, *map(escape, sorted(left))],
        )
        try:
            return step.run(graph, Context(context.ledger, self.remembered))
        except Skip:
            return PassResult()

    def _run(self, graph: Graph, samples: int | None = None) -> Iterator[Mapping[str, Array]]:
        count = min(self.settings.judge.samples, samples or self.settings.judge.samples)
        for _, values in self.held_out.stream(graph, self.outputs, count):
            yield values


def _multiplications(node: Node, values: Mapping[str, Array]) -> int:
    """Of one product: elements of its output times the length of the sums that each of them is."""
    first, second, output = (values.get(t.name, t) for t in (node.inputs[0], node.inputs[1], node.outputs[0]))
    if node.op in ("Conv", "ConvTranspose"):
        return int(prod((output if node.op == "Conv" else first).shape) * prod(second.shape[1:]))
    transposed = node.op == "Gemm" and node.attrs.get("transA", 0)
    return int(prod(output.shape) * first.shape[0 if transposed else -1])


def _converted(graph: Graph, context: Context) -> PassResult:
    try:
        return ConvertFp16().run(graph, context)
    except Skip:
        return PassResult()


def _joined(first: PassResult, second: PassResult) -> PassResult:
    """What two passes did, one after the other; of two precisions asked of a node the first is the narrower."""
    return PassResult(
        rewrites=first.rewrites + second.rewrites,
        near_misses=first.near_misses + second.near_misses,
        asked=second.asked | first.asked,
        kept=second.kept | first.kept,
        warnings=first.warnings + second.warnings,
        scales=first.scales,
    )


class _Remembered:
    """Activations that answer once of the one graph that every trial begins with: all ask the same of it."""

    def __init__(self, activations: Activations) -> None:
        self._activations = activations
        self._amax: dict[tuple[str, str, float, int], float] = {}
        self._made: dict[tuple[str, str, str, int | None], Measured] = {}
        self.absolute_maximum = activations.absolute_maximum
        self.stream = activations.stream
        self.held_out = activations.held_out

    def amax(
        self, graph: Graph, tensors: Sequence[str], *, method: str, percentile: float, samples: int
    ) -> Mapping[str, float]:
        """As `passes.base.Activations`."""
        keys = {tensor: (tensor, method, percentile, samples) for tensor in tensors}
        unknown = [tensor for tensor, key in keys.items() if key not in self._amax]
        if unknown:
            found = self._activations.amax(graph, unknown, method=method, percentile=percentile, samples=samples)
            self._amax |= {keys[tensor]: value for tensor, value in found.items()}
        return {tensor: self._amax[key] for tensor, key in keys.items()}

    def recall(
        self,
        graph: Graph,
        kind: str,
        wanted: Mapping[str, object],
        samples: int | None,
        make: Callable[[Sequence[str]], Mapping[str, Measured]],
    ) -> Mapping[str, Measured]:
        """As `passes.base.Activations`."""
        keys = {name: (kind, name, repr(asked), samples) for name, asked in wanted.items()}
        unknown = {name: wanted[name] for name, key in keys.items() if key not in self._made}
        if unknown:
            found = self._activations.recall(graph, kind, unknown, samples, make)
            self._made |= {keys[name]: measured for name, measured in found.items()}
        return {name: self._made[key] for name, key in keys.items()}
