"""The rewrites of a compile, done again up to any number: each time from the last graph that stands before it."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llmc.compiler import pipeline
from llmc.compiler.cache.memory import State
from llmc.compiler.calibrate import SampledActivations
from llmc.passes.base import Applied, Ledger, Pass, PassResult
from llmc.passes.graph import Graph, Structure, copy_graph, from_structure, to_structure

Begin = Callable[[int, Pass], None]


@dataclass(frozen=True)
class Done:
    """One pass that has run: the graphs before and after it, and its result, rewrites numbered over all passes."""

    index: int
    step: Pass
    start: State
    end: State
    result: PassResult

    @property
    def before(self) -> Graph:
        """The graph that the pass was given."""
        return from_structure(self.start.structure)


class Replay:
    """A compile's passes, run once; then any number of their rewrites again.

    A rewrite in pass p costs one run of p, from the graph before it: passes before p are never run again. Graphs
    share their weights.
    """

    def __init__(
        self, graph: Graph, passes: Sequence[Pass], provider: pipeline.Provider, begin: Begin = lambda *_: None
    ) -> None:
        self.provider = provider
        self._remembered: dict[int, _Remembered] = {}
        self.loaded = pipeline.loaded(copy_graph(graph))
        self.done = [
            Done(step.index, passes[step.index - 1], step.start, step.end, step.result)
            for step in pipeline.run(self.loaded, passes, self._provide, begin)
        ]
        self.ends = list(accumulate(len(done.result.rewrites) for done in self.done))
        """Number of the last rewrite of each pass, or of one before it."""

    @property
    def count(self) -> int:
        """Rewrites in all."""
        return self.ends[-1] if self.ends else 0

    def boundaries(self) -> list[int]:
        """The numbers at which a pass ended, 0 first."""
        return sorted({0, *self.ends})

    def owner(self, number: int) -> Done:
        """The pass that did rewrite `number`, from 1."""
        return self.done[bisect_left(self.ends, number)]

    def rewrite(self, number: int) -> Applied:
        """Rewrite `number`, from 1."""
        done = self.owner(number)
        return done.result.rewrites[number - self.start(done) - 1]

    def start(self, done: Done) -> int:
        """Rewrites that were done before this pass."""
        return self.ends[done.index - 1] - len(done.result.rewrites)

    def graph_after(self, number: int) -> Graph:
        """The graph after so many rewrites: at the end of a pass, what the next one was given."""
        if number == 0:
            return from_structure(self.loaded.end.structure)
        done = self.owner(number)
        if number == self.ends[done.index - 1]:
            return from_structure(done.end.structure)
        return self.partial(done, number - self.start(done))

    def final(self) -> Graph:
        """The graph after all passes."""
        return from_structure((self.done[-1] if self.done else self.loaded).end.structure)

    def partial(self, done: Done, rewrites: int) -> Graph:
        """The graph after this pass has done so many rewrites; 0: what it does without any."""
        return self.again(done, Ledger(stop_after=rewrites))

    def again(self, done: Done, ledger: Ledger) -> Graph:
        """The graph after this pass, with those of its rewrites that `ledger` lets it do."""
        step = pipeline.run_pass(done.start, done.index, done.step, self._provide, ledger)
        return from_structure(step.end.structure)

    def _provide(self, step: Pass) -> SampledActivations | None:
        if id(step) not in self._remembered:
            activations = self.provider(step)
            if activations is None:
                return None
            self._remembered[id(step)] = _Remembered(activations)
        return self._remembered[id(step)]


class _Remembered(SampledActivations):
    """Statistics that answer the same question about the same graph from memory."""

    def __init__(self, inner: SampledActivations) -> None:
        super().__init__(inner.samples, inner.source, known=inner.known)
        self.answers: dict[tuple[object, ...], dict[str, float]] = {}
        self.held: list[Structure] = []
        """Graphs asked about: while they are held, the ids of their weights are not used again."""

    def amax(
        self, graph: Graph, tensors: Sequence[str], *, method: str, percentile: float, samples: int
    ) -> dict[str, float]:
        key = (self._key(graph), "amax", *tensors, method, percentile, samples)
        if key not in self.answers:
            self.answers[key] = super().amax(graph, tensors, method=method, percentile=percentile, samples=samples)
        return self.answers[key]

    def absolute_maximum(self, graph: Graph, tensors: Sequence[str]) -> dict[str, float]:
        key = (self._key(graph), "absolute_maximum", *tensors)
        if key not in self.answers:
            self.answers[key] = super().absolute_maximum(graph, tensors)
        return self.answers[key]

    def _key(self, graph: Graph) -> str:
        """The graph without its weights, and which objects they are."""
        structure = to_structure(graph)
        self.held.append(structure)
        digest = hashlib.sha256(structure.model.SerializeToString(deterministic=True))
        digest.update(repr([(name, id(values)) for name, values in sorted(structure.weights.items())]).encode())
        return digest.hexdigest()
