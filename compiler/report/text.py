"""How names and quantities are written, the same in every rendering."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from llmc.compiler.report import (
    ActivationLine,
    GraphReport,
    OutputNumerics,
    PassReport,
    TaskReport,
    Timings,
    TradeOffLine,
)

_BREAK = re.compile(r"[ \t]*[\r\n\t]+[ \t]*")


def printable(text: str) -> str:
    """The text on one line, with every character that could steer a terminal or turn the line around made visible."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in _BREAK.sub(" ", text))


def scaled(value: float, unit: str) -> str:
    """Three digits and an SI prefix: 45_400_000, 'B' → '45.4 MB'."""
    rounded = float(f"{value:.3g}")
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rounded >= factor:
            return f"{rounded / factor:.4g} {prefix}{unit}"
    return f"{rounded:.4g} {unit}".rstrip()


def seconds(value: float | None) -> str:
    """'0.42 s', '41.2 s', '2 min 5 s'; '' for a time that was not taken."""
    if value is None:
        return ""
    if value < 10:
        return f"{value:.2f} s"
    if value < 60:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60} s"


CACHED = "cached"
"""In the place of the time of a step that was not run, but found in the cache."""


def time_of(timings: Timings, step: str) -> str:
    """How long a step took ('load', '1 fold-constants', 'build'), or that it was found in the cache."""
    return CACHED if step in timings.cached else seconds(timings.steps.get(step))


def memory(timings: Timings) -> str:
    """'llmc 1.2 GB, builder 5.31 GB': the most that each process had; '' where that is not known."""
    return ", ".join(f"{name} {scaled(size, 'B')}" for name, size in timings.memory.items())


def similarity(cosine: float | None) -> str:
    """A cosine with six decimals; '' where none was measured."""
    return "" if cosine is None else f"{cosine:.6f}"


def difference(value: float | None) -> str:
    """A small number with two digits, '0' where there is no difference; '' where none was measured."""
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else str(value)


LOCAL = "°"
LOCAL_NOTE = f"{LOCAL} only the regions that the pass changed, against what stood there before"


def local(step: PassReport, value: str) -> str:
    """A measured value of a step, marked where only regions of the graph were compared."""
    return f"{value}{LOCAL}" if value and step.verified == "local" else value


def task(found: TaskReport) -> str:
    """'accuracy 0.912 → 0.908, loses 0.004 (0.01 may), on 872 samples of labelled.tsv'."""
    may = "" if found.max_drop is None else f" ({found.max_drop:g} may)"
    values = [math.nan if value is None else value for value in (found.source, found.compiled, found.drop)]
    moved = f"{found.metric} {values[0]:.4g} → {values[1]:.4g}, loses {values[2]:.3g}{may}"
    return f"{moved}, on {plural(found.samples, 'sample')} of {found.data}"


def decibels(numerics: OutputNumerics) -> str:
    """The ratio of signal to difference, '54.3 dB'; 'equal' without a difference, '–' without a number."""
    if numerics.sqnr_db is not None:
        return f"{numerics.sqnr_db:.1f} dB"
    return "equal" if numerics.max_abs == 0 else "–"


TRADE_OFFS = ("", "#Layers", "#Weights", "#Time", "#Cosine", "#at 95 %", "#Relative L2", "#at 95 %")
"""Columns of `trade_off`; time is that of the products, where all of them in float32 take 1."""


def trade_off(line: TradeOffLine) -> tuple[str, ...]:
    """An assignment of precisions in columns: layers in the narrowest one of all, what it costs, what it loses."""
    return (
        "chosen" if line.chosen else "",
        f"{line.layers} of {line.layers + len(line.left)}",
        scaled(line.weight_bytes, "B"),
        f"{line.time:.2f}",
        similarity(line.cosine),
        similarity(line.cosine_bound),
        difference(line.relative_l2),
        difference(line.relative_l2_bound),
    )


ACTIVATIONS = ("Tensor", "#Saturated", "#Clips at", "#Largest", "#Scale")
"""Columns of `activation`."""


def activation(line: ActivationLine) -> tuple[str, ...]:
    """A quantized activation in columns: the share of its values that are clipped, and where."""
    return line.tensor, share(line.saturated), f"{line.clip:.3g}", f"{line.amax:.3g}", f"{line.scale:.3g}"


def share(value: float | None) -> str:
    """'0.012 %', '< 0.0001 %', '0'; '' where it is not known."""
    if not value:
        return "" if value is None else "0"
    return f"{100 * value:.2g} %" if value >= 1e-6 else "< 0.0001 %"


_HEIGHTS = "▁▂▃▄▅▆▇█"


def bars(counts: Sequence[int]) -> str:
    """A histogram on one line, two counts a bar, as high as its logarithm: '█▆▅▃▁··▁'; a dot where there is none."""
    pairs = [sum(counts[start : start + 2]) for start in range(0, len(counts), 2)]
    most = math.log2(1 + max(pairs, default=0))
    return "".join(_HEIGHTS[math.ceil(8 * math.log2(1 + n) / most) - 1] if n else "·" for n in pairs)


def shape(dimensions: Sequence[int | str | None] | None) -> str:
    """'batch × sequence × 384'; 'scalar' without dimensions; '?' for what is unknown."""
    if dimensions is None:
        return "?"
    return " × ".join("?" if size is None else str(size) for size in dimensions) or "scalar"


def arrow(before: object, after: object) -> str:
    """'288 → 191', or the one value where nothing changed."""
    return str(after) if before == after else f"{before} → {after}"


def plural(count: int, noun: str) -> str:
    """'1 layer', '36 layers', '2 near misses'."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def fact(key: str, value: object) -> str:
    """A fact's value in words: bytes by their key ('…_bytes'), lists with commas, flags as yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{label(name)} {fact(name, inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(fact(key, inner) for inner in value)
    if isinstance(value, int) and key.endswith("bytes"):
        return scaled(value, "B")
    return "–" if value is None else str(value)


def label(key: str) -> str:
    """A fact's key in words: 'activation_bytes' → 'activation'."""
    return key.removesuffix("_bytes").replace("_", " ")


def flops(graph: GraphReport) -> str:
    """'2.87 GFLOP at batch 1, sequence 128', with what is not in the count."""
    if graph.flops is None:
        names = {size for tensor in graph.inputs for size in tensor.shape or () if isinstance(size, str)}
        missing = ", ".join(sorted(names - graph.sizes.keys()))
        return f"unknown without sizes of {missing}" if missing else "unknown: shapes are not known"
    at = ", ".join(f"{name} {size}" for name, size in graph.sizes.items())
    missing = f", without {plural(graph.flops_uncounted, 'product')} of unknown cost" if graph.flops_uncounted else ""
    return f"{scaled(graph.flops, 'FLOP')}{f' at {at}' if at else ''}{missing}"
