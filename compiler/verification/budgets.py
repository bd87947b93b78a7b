"""Whether budgets allow what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from llmc.compiler.recipe.sections import AT_LEAST, CustomMetric
from llmc.compiler.report import OutputNumerics


def breaches(
    numerics: Sequence[OutputNumerics],
    budgets: Mapping[str, float],
    custom: Mapping[str, CustomMetric] = MappingProxyType({}),
) -> list[str]:
    """One line for each output and metric that is outside its budget; NaN and infinity are outside of any."""
    lines = []
    for line in numerics:
        if not line.finite:
            lines.append(f"output '{line.output}' has NaN or infinity where the reference has none")
            continue
        for metric, bound in budgets.items():
            value = getattr(line, metric)
            if value is None:  # sqnr_db of equal outputs; metrics of logits where an output has no rows
                continue
            if metric in AT_LEAST and not value >= bound:
                lines.append(f"output '{line.output}': {metric} is {value:.6g}, the budget asks for at least {bound:g}")
            if metric not in AT_LEAST and not value <= bound:
                lines.append(f"output '{line.output}': {metric} is {value:.6g}, the budget allows at most {bound:g}")
        for name, own in custom.items():
            value = line.custom.get(name)
            if value is None:
                continue
            if own.at_least is not None and not value >= own.at_least:
                lines.append(f"output '{line.output}': {name} is {value:.6g}, at least {own.at_least:g} is asked for")
            if own.at_most is not None and not value <= own.at_most:
                lines.append(f"output '{line.output}': {name} is {value:.6g}, at most {own.at_most:g} is allowed")
    return lines
