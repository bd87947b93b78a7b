"""The page's section on what a pass has quantized: activations beside the point they clip at, weights, and scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llmc.compiler.report import ActivationLine, PassReport, charts, summary, text
from llmc.compiler.report.markup import Markup, code, element, fold, legend, section, table

NOTE = "Values on the calibration data; what is larger than the clipping point saturates. Heights are logarithmic."


def quantized(step: PassReport) -> Markup | None:
    """The section; None where the pass has scales neither of activations nor of weights."""
    scales = [_scales(kind, octaves) for kind, octaves in summary.scales(step).items() if octaves]
    parts = [*_activations(step), *_weights(step)]
    if not parts and not scales:
        return None
    return section(f"What {step.key} quantized", *parts, element("div", *scales, class_="columns"))


def _activations(step: PassReport) -> Iterator[Markup]:
    rows = [(code(line.tensor), *text.activation(line)[1:], _magnitudes(line)) for line in summary.most_saturated(step)]
    if rows:
        yield element("p", NOTE, class_="note")
        yield fold("Activations", len(rows), table((*text.ACTIVATIONS, "Magnitudes"), rows))
        yield legend(("stayed", "in range"), ("added", "saturated"))


def _weights(step: PassReport) -> Iterator[Markup]:
    rows = [(code(name), text.share(share)) for name, share in summary.most_clipped(step)]
    if rows:
        yield fold(
            "Weights, and the share of values beyond the last level", len(rows), table(("Weight", "#Saturated"), rows)
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
