"""Whether budgets allow what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmc.compiler.recipe.sections import AT_LEAST
from llmc.compiler.report import OutputNumerics


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
