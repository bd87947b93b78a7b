"""How well a model does what it is for: accuracy, F1, correlation with human scores, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llmc.compiler.data.labelled import Labelled, read_labelled
from llmc.compiler.data.text import Encoder
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Feeds
from llmc.compiler.recipe.sections import TaskSection
from llmc.compiler.verification.metrics import log_softmax
from llmc.passes.graph import Array, Graph

Run = Callable[[Feeds], Mapping[str, Array]]
"""Runs a model on one set of inputs."""


class Task:
    """A measure on labelled data, ready to be taken of the source model and of the compiled graph."""

    def __init__(self, section: TaskSection, graph: Graph, tokenizer: Path | None, limit: int | None) -> None:
        """`graph` says what the inputs and outputs are. Raises LlmcError for data that does not fit."""
        self.section = section
        names = [tensor.name for tensor in graph.outputs]
        self.output = section.output or names[0]
        if self.output not in names:
            raise LlmcError(f"verify.task.output: the model has no output '{self.output}'; it has: {', '.join(names)}")
        if tokenizer is None:
            raise LlmcError("verify.task needs a tokenizer, and the model brings none: give --tokenizer DIR")
        correlates = section.metric in ("spearman", "pearson")
        labels = section.metric != "perplexity"
        self.rows = read_labelled(section.data, pairs=correlates, labels=labels)[: section.samples]
        self.encode = Encoder(
            section.data, tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json", graph, limit
        )

    def measure(self, run: Run) -> float:
        """The metric, over all rows."""
        metric = self.section.metric
        if metric == "perplexity":
            return self._perplexity(run)
        labels = [row.label if row.label is not None else math.nan for row in self.rows]
        if metric in ("spearman", "pearson"):
            scores = [self._similarity(run, row) for row in self.rows]
            return (spearman if metric == "spearman" else pearson)(scores, labels)
        found = [self._class(run, row) for row in self.rows]
        return (accuracy if metric == "accuracy" else f1)(found, [int(label) for label in labels])

    def drop(self, source: float, compiled: float) -> float:
        """How much was lost from one value to the other."""
        if self.section.metric == "perplexity":
            return compiled / source - 1
        return source - compiled

    def _value(self, run: Run, feeds: Feeds) -> Array:
        value: Array = run(feeds)[self.output].astype(np.float64)
        return value

    def _class(self, run: Run, row: Labelled) -> int:
        logits = self._value(run, self.encode(row.line, row.text, row.pair)).reshape(-1)
        return int(logits[0] > 0) if logits.size == 1 else int(logits.argmax())

    def _similarity(self, run: Run, row: Labelled) -> float:
        """The score that the model gives both texts together, or the cosine of their embeddings."""
        joint = self._value(run, self.encode(row.line, row.text, row.pair))
        if joint.size == 1:
            return float(joint.reshape(()))
        a, b = (self._embedding(run, row.line, text) for text in (row.text, row.pair or ""))
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    def _embedding(self, run: Run, line: int, text: str) -> Array:
        """[size]: what the model gives for the text, or the mean over its tokens."""
        feeds = self.encode(line, text)
        value: Array = self._value(run, feeds)[0]
        if value.ndim == 1:
            return value
        mask = feeds.get("attention_mask", np.ones((1, len(value))))[0].astype(np.float64)
        mean: Array = (value * mask[:, None]).sum(axis=0) / mask.sum()
        return mean

    def _perplexity(self, run: Run) -> float:
        """e to the mean negative log-likelihood of each token after the first of its text."""
        total, count = 0.0, 0
        for row in self.rows:
            feeds = self.encode(row.line, row.text)
            length = int(feeds["attention_mask"].sum()) if "attention_mask" in feeds else feeds["input_ids"].shape[1]
            tokens = feeds["input_ids"][0, 1:length]
            likely = log_softmax(self._value(run, feeds)[0, : length - 1])
            total -= float(likely[np.arange(len(tokens)), tokens].sum())
            count += len(tokens)
        if not count:
            raise LlmcError(f"{self.section.data}: perplexity needs a text of two tokens or more")
        return math.exp(total / count)


def accuracy(found: Sequence[int], labels: Sequence[int]) -> float:
    """The part of classes that are right."""
    return float(np.mean(np.array(found) == np.array(labels)))


def f1(found: Sequence[int], labels: Sequence[int]) -> float:
    """Of class 1 where there are two classes; else the mean over the classes among the labels."""
    classes = sorted(set(labels))
    chosen = [1] if set(classes) <= {0, 1} else classes
    a, b = np.array(found), np.array(labels)
    scores = []
    for kind in chosen:
        hits = int(((a == kind) & (b == kind)).sum())
        size = int((a == kind).sum() + (b == kind).sum())
        scores.append(2 * hits / size if size else 0.0)
    return float(np.mean(scores))


def pearson(found: Sequence[float], labels: Sequence[float]) -> float:
    """Linear correlation; NaN where one side does not vary."""
    a, b = (np.array(values, dtype=np.float64) - np.mean(values) for values in (found, labels))
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else math.nan


def spearman(found: Sequence[float], labels: Sequence[float]) -> float:
    """Correlation of ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(found), _ranks(labels))


def _ranks(values: Sequence[float]) -> list[float]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[inverse]
    return [float(rank) for rank in ranks]
