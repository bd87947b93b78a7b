"""What several renderings draw from a Report: totals, the worst of each step, near misses and precision grouped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from llmc.compiler.report import ActivationLine, LayerPrecision, NearMissLine, OutputNumerics, PassReport, Report
from llmc.compiler.report.text import time_of


@dataclass
class NearMisses:
    """Near misses of one pass that were stopped by the same thing."""

    step: str
    rule: str
    reason: str
    places: list[NearMissLine] = field(default_factory=list)

    @property
    def first_place(self) -> str:
        """The module of the first one, or its node where the exporter named no modules."""
        return self.places[0].module or self.places[0].node


@dataclass(frozen=True)
class PrecisionGroup:
    """Layers for which the same dtype was asked and the same was found."""

    asked: str
    found: str
    engine: str
    operators: dict[str, int]
    """Operator → layers, most frequent first."""

    @property
    def count(self) -> int:
        return sum(self.operators.values())

    @property
    def as_asked(self) -> bool:
        """Whether graph and engine have what was asked; a layer's weights alone say nothing of its arithmetic."""
        return self.asked == self.found and (self.engine in ("", self.found) or " " in self.found)


def step_time(report: Report, step: PassReport) -> str:
    """How long a step took, or that it was found in the cache; '' where no time was taken."""
    return time_of(report.timings, f"{step.index} {step.key}" if step.index else step.key)


def worst_cosine(step: PassReport) -> float | None:
    """The lowest cosine of any output, NaN before any number; None where none was measured."""
    return max(_measured(n.cosine for n in _outputs(step)), key=lambda cosine: _badness(1 - cosine), default=None)


def worst_max_abs(step: PassReport) -> float | None:
    """The largest absolute difference of any output, NaN before any number; None where none was measured."""
    return max(_measured(n.max_abs for n in _outputs(step)), key=_badness, default=None)


def worst_relative_l2(step: PassReport) -> float | None:
    """The largest relative difference of any output, NaN before any number; None where none was measured."""
    return max(_measured(n.relative_l2 for n in _outputs(step)), key=_badness, default=None)


def _outputs(step: PassReport) -> list[OutputNumerics]:
    """Those of the graph, or where only regions were compared those of the regions."""
    moved = [output for region in step.regions for output in region.outputs]
    if step.verified == "local" and not moved:
        return [OutputNumerics(output="", max_abs=0.0, relative_l2=0.0, cosine=1.0, finite=True)]
    return step.numerics or moved


def other_metrics(numerics: OutputNumerics) -> dict[str, float]:
    """What was measured beside the metrics that every output has: those of logits, and the recipe's own."""
    found = {"top1": numerics.top1, "top5": numerics.top5, "kl": numerics.kl, **numerics.custom}
    return {name: value for name, value in found.items() if value is not None}


def _measured(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _badness(distance: float) -> float:
    return math.inf if math.isnan(distance) else distance


def near_misses(report: Report) -> list[NearMisses]:
    """Near misses of all passes, those with one cause together, the most frequent first."""
    groups: dict[tuple[str, str, str], NearMisses] = {}
    for step in report.passes:
        for miss in step.near_misses:
            key = (step.key, miss.rule, miss.reason)
            groups.setdefault(key, NearMisses(*key)).places.append(miss)
    return sorted(groups.values(), key=lambda group: -len(group.places))


def precision_groups(layers: Iterable[LayerPrecision]) -> list[PrecisionGroup]:
    """Layers by what was asked and found: first those that did not get what was asked, then the most frequent."""
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for layer in layers:
        counts.setdefault((layer.asked, layer.found, layer.engine), Counter())[layer.op] += 1
    groups = [PrecisionGroup(*key, dict(operators.most_common())) for key, operators in counts.items()]
    return sorted(groups, key=lambda group: (group.as_asked, -group.count))


def most_saturated(step: PassReport) -> list[ActivationLine]:
    """What the pass quantized, those first that lose the largest share of their values to clipping."""
    return sorted(step.activations, key=lambda line: -(line.saturated or 0.0))


def most_clipped(step: PassReport) -> list[tuple[str, float]]:
    """Weights that the pass quantized and the share of their values beyond the last level, the largest share first."""
    return sorted(step.clipped_weights.items(), key=lambda item: -item[1])


def scales(step: PassReport) -> dict[str, dict[int, int]]:
    """'weights' and 'activations' → exponent e → how many of their scales are in [2^e, 2^(e + 1))."""
    of_activations = Counter(math.frexp(line.scale)[1] - 1 for line in step.activations)
    return {"weights": step.weight_scales, "activations": dict(sorted(of_activations.items()))}


def operator_changes(before: dict[str, int], after: dict[str, int]) -> list[tuple[str, int, int]]:
    """Operator, nodes before, nodes after: for every operator of either side, the most frequent first."""
    rows = [(name, before.get(name, 0), after.get(name, 0)) for name in {*before, *after}]
    return sorted(rows, key=lambda row: (-max(row[1:]), row[0]))


def node_total(nodes: dict[str, int]) -> int:
    """Nodes of all operators."""
    return sum(nodes.values())


def first_nodes(report: Report) -> dict[str, int]:
    """Operator → nodes of the graph as it was loaded."""
    return next((step.nodes_after if step.index == 0 else step.nodes_before for step in report.passes), {})


def first_weight_bytes(report: Report) -> int | None:
    """Bytes of weights as loaded; None where the report has no load step."""
    return next((step.weight_bytes_after for step in report.passes if step.index == 0), None)


def weight_totals(report: Report) -> tuple[int, int]:
    """Parameters and bytes of all dtypes."""
    weights = report.graph.weights.values()
    return sum(w.parameters for w in weights), sum(w.bytes for w in weights)


def last_numerics(report: Report) -> PassReport | None:
    """The last step that was compared with the reference."""
    return next((step for step in reversed(report.passes) if step.numerics), None)


def failed(report: Report) -> list[PassReport]:
    """The steps that ended the compile, and those of which something was left out because it broke a budget."""
    return [step for step in report.passes if step.status in ("rolled back", "over budget", "crashed")]


def warnings(report: Report) -> list[tuple[str, str]]:
    """Where it came from and what it says: the report's own, then those of passes and of the target, each once."""
    found = [("", text) for text in report.warnings]
    found += [(step.key, text) for step in report.passes for text in step.warnings]
    found += [(report.target.kind, text) for text in report.target.warnings] if report.target else []
    said: dict[str, str] = {}
    for origin, text in found:
        said.setdefault(text, origin)
    return [(origin, text) for text, origin in said.items()]
