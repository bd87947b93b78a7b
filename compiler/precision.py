"""Precision asked for against precision found: in the graph, and in the engine that was built of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llmc.compiler.report import LayerPrecision
from llmc.compiler.report.statistics import layer_precision
from llmc.passes.base import PassResult
from llmc.passes.graph import Graph

WIDTHS = ("int2", "int3", "float4_e2m1fn", "int4", "int8", "float8_e4m3fn", "bfloat16", "float16", "float32")
"""dtypes from the narrowest: of two passes that ask something of one layer, the narrower one counts."""
LINES_SHOWN = 8


@dataclass
class Asked:
    """What the passes of a run asked of each layer, and why they left others alone."""

    dtypes: dict[str, str] = field(default_factory=dict)
    """Node → the dtype that its arithmetic was asked to have, or its weights ('int4 weights')."""
    kept: dict[str, str] = field(default_factory=dict)
    """Node → why a pass left it in its old precision."""

    def remember(self, result: PassResult) -> None:
        """Add what one more pass asked."""
        for node, dtype in result.asked.items():
            before = self.dtypes.get(node)
            if before is None or _width(dtype) < _width(before):
                self.dtypes[node] = dtype
        self.kept.update(result.kept)

    def layers(self, graph: Graph, engine_layers: Sequence[Mapping[str, object]] = ()) -> list[LayerPrecision]:
        """Each layer with arithmetic, as asked, as found in `graph`, and as the engine computes it."""
        layers = layer_precision(graph, self.dtypes, self.kept)
        products = _products(engine_layers)
        return [layer.model_copy(update={"engine": products.get(layer.node, "")}) for layer in layers]


def fallbacks(layers: Iterable[LayerPrecision]) -> list[str]:
    """A line for each layer that is not as asked, where no pass gave a reason."""
    lines = []
    for layer in layers:
        name = f"{layer.op} '{layer.node}'" + (f" ({layer.module})" if layer.module else "")
        if layer.asked != layer.found and not layer.reason:
            lines.append(f"{name} was asked to be {layer.asked}, and is {layer.found}")
        elif layer.engine and layer.found in WIDTHS and layer.engine != layer.found:
            lines.append(f"{name} is {layer.found} in the graph, but the engine computes it in {layer.engine}")
    return lines


def some(lines: Sequence[str]) -> str:
    """The first of many lines, indented, and how many more there are."""
    more = [f"and {len(lines) - LINES_SHOWN} more, in the report"] if len(lines) > LINES_SHOWN else []
    return "".join(f"\n  {line}" for line in [*lines[:LINES_SHOWN], *more])


def _width(dtype: str) -> int:
    """Place in `WIDTHS`, of the weights where only they are narrow ('int4 weights')."""
    return WIDTHS.index(dtype.removesuffix(" weights"))


def _products(engine_layers: Iterable[Mapping[str, object]]) -> dict[str, str]:
    """ONNX node → the dtype that the engine multiplies it in; the widest, where it is several layers there."""
    found: dict[str, str] = {}
    for layer in engine_layers:
        dtype, nodes = layer.get("product"), layer.get("nodes")
        if dtype in WIDTHS and isinstance(nodes, list):
            for node in nodes:
                found[node] = max(str(dtype), found.get(node, WIDTHS[0]), key=WIDTHS.index)
    return found
