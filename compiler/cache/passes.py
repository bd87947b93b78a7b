"""Results of passes: found by the graph before, the pass with its parameters and its code, and the data it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from llmc.compiler.cache.keys import code_digest, environment
from llmc.compiler.cache.memory import Memory, State
from llmc.passes.base import Applied, Ledger, Pass, PassResult


@dataclass(frozen=True)
class Outcome:
    """What a pass did."""

    result: PassResult
    skipped: str
    """Why it did not apply; '' where it did."""
    after: State


class PassMemory:
    """What is known of one pass that is about to run."""

    def __init__(self, memory: Memory, before: State, step: Pass, ledger: Ledger, data: str | None) -> None:
        """`data` is the digest of what its activations stand on; None where that is not known."""
        self.memory = memory
        self.ledger = ledger
        self.known = step.repeatable and before.ref is not None and data is not None
        self.taken = ledger.taken
        parameters = {step.key(): step.model_dump(mode="json")}
        left_out = (sorted(ledger.refused), sorted(ledger.offered))
        code = code_digest(type(step).__module__) if self.known else ""
        inferred = None if before.since_inference is None else before.since_inference == 0
        self.parts = (before.digest, inferred, parameters, code, environment(), data, left_out)

    def find(self) -> Outcome | None:
        """The outcome of an earlier run, where that did no more rewrites than this one is allowed."""
        found = self.memory.find_state("pass", *self.parts) if self.known else None
        if found is None:
            return None
        value, after = found
        ledger = self.ledger
        if ledger.stop_after is not None and self.taken + value["taken"] > ledger.stop_after:
            return None
        ledger.taken += value["taken"]
        ledger.offered |= {(rule, node) for rule, node in value["offered"]}
        return Outcome(_result(value["result"], self.taken), value["skipped"], after)

    def keep(self, outcome: Outcome) -> None:
        """Keep the outcome for later runs, unless this one may have ended inside the pass."""
        ledger = self.ledger
        if not self.known or (ledger.stop_after is not None and ledger.taken >= ledger.stop_after):
            return
        result = replace(outcome.result, rewrites=_renumbered(outcome.result.rewrites, -self.taken))
        value = {
            "result": asdict(result),
            "skipped": outcome.skipped,
            "taken": ledger.taken - self.taken,
            "offered": sorted(ledger.offered),
        }
        self.memory.keep_state("pass", self.parts, value, outcome.after)


def _result(value: Mapping[str, Any], taken: int) -> PassResult:
    """As it was, numbered on from `taken`."""
    result = _results().validate_python(value)
    return replace(result, rewrites=_renumbered(result.rewrites, taken))


@cache
def _results() -> TypeAdapter[PassResult]:
    return TypeAdapter(PassResult)


def _renumbered(rewrites: list[Applied], by: int) -> list[Applied]:
    return [replace(rewrite, number=rewrite.number + by) for rewrite in rewrites]
