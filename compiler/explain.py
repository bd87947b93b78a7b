"""Every place where a pass fired or came close on a model, and the first thing that stopped it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.compiler import catalogue, pipeline
from llmc.compiler.errors import InternalError, LlmcError, TwoGraphsError
from llmc.compiler.loaders import HALVES, Half, load
from llmc.compiler.recipe import Recipe
from llmc.passes.base import Pass, PassResult

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Explanation:
    """What one pass did to a model, after the passes that a recipe runs before it."""

    key: str
    half: Half | None
    """The graph, of an encoder-decoder's two."""
    before: tuple[str, ...]
    """Keys of the passes that ran first."""
    result: PassResult
    skipped: str

    def as_json(self) -> dict[str, object]:
        """The explanation as plain values."""
        return {
            "pass": self.key,
            "after": list(self.before),
            "skipped": self.skipped,
            "rewrites": [vars(rewrite) for rewrite in self.result.rewrites],
            "near_misses": [vars(miss) for miss in self.result.near_misses],
        }


def explain(source: str, key: str, recipe: Recipe) -> list[Explanation]:
    """Load `source`, run the recipe's passes up to `key` (all of them where it has no such pass), then `key` itself.

    One explanation for each graph: an encoder-decoder makes two. Raises LlmcError for an unknown pass, or for one that
    needs calibration data, and InternalError where one crashes.
    """
    try:
        return [_explain(source, key, recipe)]
    except TwoGraphsError:
        return [_explain(source, key, recipe.with_values({"model.half": half})) for half in HALVES]


def _explain(source: str, key: str, recipe: Recipe) -> Explanation:
    kind = catalogue.find(key)
    if kind.needs:
        raise LlmcError(f"{key} needs {', '.join(kind.needs)}; the report of `llmc compile` says what it left alone")
    keys = [step.key() for step in recipe.passes]
    end = keys.index(key) if key in keys else len(keys)
    chosen: Pass = recipe.passes[end] if key in keys else kind()
    first = [step for step in recipe.passes[:end] if not step.needs]
    model = recipe.model
    loaded = load(
        source,
        task=model.task,
        opset=model.opset,
        cache=model.cache,
        half=model.half,
        trust_remote_code=model.trust_remote_code,
    )
    try:
        *_, last = pipeline.run(pipeline.loaded(loaded.graph), [*first, chosen], lambda _: None)
    except pipeline.PassCrash as crash:
        raise InternalError(
            f"{crash}.\nThis is a bug of llmc; `llmc compile` with a recipe that has {crash.step.key} keeps the graph "
            "before it, the traceback, and the command that shows it again"
        ) from crash
    return Explanation(key, loaded.half, tuple(step.key() for step in first), last.result, last.skipped)


def as_json(explanations: Sequence[Explanation]) -> object:
    """Explanations as plain values; those of several graphs under their names."""
    if len(explanations) == 1:
        return explanations[0].as_json()
    return {str(found.half): found.as_json() for found in explanations}


def render(explanations: Sequence[Explanation], console: Console) -> None:
    """Print explanations."""
    for number, explanation in enumerate(explanations):
        if number:
            console.print()
        _render(explanation, console)


def _render(explanation: Explanation, console: Console) -> None:
    from rich.table import Table

    result = explanation.result
    after = f", after {', '.join(explanation.before)}" if explanation.before else ""
    graph = f"{explanation.half}: " if explanation.half else ""
    console.print(f"{graph}{explanation.key}{after}", markup=False, highlight=False)
    if explanation.skipped:
        console.print(f"does not apply: {explanation.skipped}", markup=False, highlight=False)
    for title, rows in (
        (f"fired {len(result.rewrites)} times", [(r.rule, r.node, r.detail or r.module) for r in result.rewrites]),
        (f"came close {len(result.near_misses)} times", [(m.rule, m.node, m.reason) for m in result.near_misses]),
    ):
        console.print(f"\n{title}", style="bold")
        table = Table(box=None, pad_edge=False, show_header=False)
        for row in rows:
            table.add_row(*map(_escape, row))
        if rows:
            console.print(table)


def _escape(value: str) -> str:
    from rich.markup import escape

    return escape(value)
