"""The whole graph against the reference, output by output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

from llmc.compiler.cache import outputs
from llmc.compiler.cache.keys import code_digest, environment
from llmc.compiler.cache.memory import NOTHING, Memory, State
from llmc.compiler.loaders import Feeds
from llmc.compiler.recipe.sections import METRICS, Metric
from llmc.compiler.report import OutputNumerics
from llmc.compiler.session import Session
from llmc.compiler.verification.custom import custom_digest
from llmc.compiler.verification.metrics import Custom, compare
from llmc.passes.graph import Array, Graph


class Verifier:
    """Compares graphs with a reference on fixed samples. The reference runs once, and only where that is needed.

    `reference` gives for each of the samples, in turn, the values of the outputs.
    """

    def __init__(
        self,
        reference: Callable[[Iterable[Feeds]], Iterable[Mapping[str, Array]]],
        samples: Iterable[Feeds],
        metrics: Sequence[Metric] = METRICS,
        memory: Memory = NOTHING,
        about: Sequence[object] = (),
        custom: Custom = MappingProxyType({}),
    ) -> None:
        """`about` is all that the reference and the samples depend on: what is found in `memory` by."""
        self._reference = reference
        self._given = samples
        self._metrics = metrics
        self._memory = memory
        self._custom = custom
        self.about = (*about, code_digest(__name__) if memory.store else "", environment(), *custom_digest(custom))
        """All that the reference and the samples depend on."""

    @cached_property
    def samples(self) -> Sequence[Feeds]:
        """The inputs of each run."""
        return list(self._given)

    @cached_property
    def expected(self) -> Sequence[Mapping[str, Array]]:
        """What the reference makes of the samples."""
        return outputs.recall(self._memory, self.about, lambda: list(map(dict, self._reference(self.samples))))

    def measure(self, graph: Graph | State) -> list[OutputNumerics]:
        """Run a graph over the samples (ONNX Runtime, optimizations off) and compare every output.

        What is known of a State is not measured again.
        """
        digest = graph.digest if isinstance(graph, State) else ""
        parts = (digest, self._metrics, *self.about) if digest else ()
        found = self._memory.find("numerics", *parts) if parts else None
        if found is not None:
            return [OutputNumerics.model_construct(**line) for line in found.value["outputs"]]
        session = Session(graph.graph if isinstance(graph, State) else graph)
        numerics = compare(zip(self.expected, session.run_each(self.samples), strict=True), self._metrics, self._custom)
        if parts:
            self._memory.keep("numerics", parts, {"outputs": [dict(line) for line in numerics]})
        return numerics
