"""The page's section on what a pass has quantized: activations beside the point they clip at, and scales."""

from __future__ import annotations

from collections.abc import Mapping

from llmc.compiler.report import ActivationLine, PassReport, charts, summary, text
from llmc.compiler.report.markup import Markup, code, element, fold, legend, section, table

NOTE = "Values on the calibration data; what is larger than the clipping point saturates. Heights are logarithmic."


def quantized(step: PassReport) -> Markup | None:
    """The section; None where the pass has no scales from calibration."""
    if not step.activations:
        return None
    lines = summary.most_saturated(step)
    rows = [(code(line.tensor), *text.activation(line)[1:], _magnitudes(line)) for line in lines]
    shown = table((*text.ACTIVATIONS, "Magnitudes"), rows)
    scales = [_scales(kind, octaves) for kind, octaves in summary.scales(step).items() if octaves]
    return section(
        f"What {step.key} quantized",
        element("p", NOTE, class_="note"),
        fold("Activations", len(rows), shown),
        legend(("stayed", "in range"), ("added", "saturated")),
        element("div", *scales, class_="columns"),
    )


def _magnitudes(line: ActivationLine) -> Markup | None:
    if not line.counts:
        return None
    title = f"up to {line.amax:.3g}, clips at {line.clip:.3g}"
    return element("div", charts.histogram(line.counts, title, line.clip / line.bin_width), class_="histogram")


def _scales(kind: str, octaves: Mapping[int, int]) -> Markup:
    least, most = min(octaves), max(octaves)
    counts = [octaves.get(exponent, 0) for exponent in range(least, most + 1)]
    heading = f"Scales of {kind}: {sum(counts):,}, from 2^{least} to 2^{most + 1}"
    return element("div", element("h3", heading), charts.histogram(counts, heading))
