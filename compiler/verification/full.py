"""The whole graph against the reference, output by output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmc.compiler.loaders import Feeds
from llmc.compiler.recipe.sections import METRICS, Metric
from llmc.compiler.report import OutputNumerics
from llmc.compiler.session import Session
from llmc.compiler.verification.metrics import compare
from llmc.passes.graph import Array, Graph


@dataclass
class Verifier:
    """Compares graphs with a reference on fixed samples; the reference's outputs are computed once."""

    samples: Sequence[Feeds]
    expected: Sequence[Mapping[str, Array]]
    metrics: Sequence[Metric] = METRICS

    @classmethod
    def against(
        cls,
        reference: Callable[[Feeds], Mapping[str, Array]],
        samples: Iterable[Feeds],
        metrics: Sequence[Metric] = METRICS,
    ) -> Verifier:
        """A verifier whose truth is what `reference` makes of the samples."""
        held = list(samples)
        return cls(held, [reference(sample) for sample in held], metrics)

    def measure(self, graph: Graph) -> list[OutputNumerics]:
        """Run `graph` over the samples (ONNX Runtime, optimizations off) and compare every output."""
        session = Session(graph)
        return compare(zip(self.expected, map(session.run, self.samples), strict=True), self.metrics)
