"""Proof that a graph still computes what the source does: metrics, budgets, and what is run to measure them."""

from __future__ import annotations

from collections.abc import Iterable

from llmc.compiler.loaders import Feeds
from llmc.compiler.report import OutputNumerics
from llmc.compiler.session import Session
from llmc.compiler.verification.budgets import breaches as breaches
from llmc.compiler.verification.full import Verifier as Verifier
from llmc.compiler.verification.metrics import compare as compare
from llmc.compiler.verification.metrics import row_cosines as row_cosines
from llmc.passes.graph import Graph


def verify(graph: Graph, reference: Graph, samples: Iterable[Feeds]) -> list[OutputNumerics]:
    """How far `graph` is from `reference` on `samples`, output by output."""
    return Verifier(Session(reference).run_each, samples).measure(graph)
