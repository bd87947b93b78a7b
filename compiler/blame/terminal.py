"""What was found, in a terminal: names come from models, so none is read as rich markup."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmc.compiler.blame.growth import landmarks
from llmc.compiler.blame.plot import sparkline
from llmc.compiler.blame.report import Blame, Guilty, Reproduction, Sensitivity, TensorError
from llmc.compiler.report import OutputNumerics
from llmc.compiler.report.text import difference, printable, similarity

ROWS = 12
"""Of the table of growth."""
LAYERS = 12
"""Of the table of layers."""
WIDTH = 120
NUMBERS = 56
"""Columns of a table that are not for names."""
LARGEST_FLOAT16 = 65504


def render(blame: Blame, console: Console, folder: Path) -> None:
    """Print the answer."""
    say = _Printer(console)
    last = blame.points[-1]
    budget = ", ".join(f"{metric} {bound:g}" for metric, bound in blame.budget.items())
    say(f"{blame.source}, recipe {blame.recipe}: {blame.rewrites} rewrites, {len(blame.points)} measured, {budget}")
    if blame.status == "holds":
        say(f"No rewrite breaks the budget: {_numbers(last.numerics)} at the end.", "bold green")
    elif blame.guilty is None:
        say("The loaded graph breaks the budget before any rewrite: the exporter is to blame.", "bold red")
        say.lines(blame.points[0].breaches)
    else:
        _guilty(blame, blame.guilty, say)
    if not blame.monotone:
        say("The error does not only grow from rewrite to rewrite: others may break the budget too; --scan finds the")
        say("first of all.")
    for found in blame.sensitivity:
        _sensitivity(found, say)
    say.lines(blame.notes)
    if blame.guilty is not None:
        say(f"\n{folder}/growth.svg, {folder}/blame.json", "dim")


class _Printer:
    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    def name(self, text: str) -> Text:
        """The end of a name, which tells more than its beginning, as long as a table has room for two."""
        shown, room = printable(text), max((min(self.console.width, WIDTH) - NUMBERS) // 2, 12)
        return Text(shown if len(shown) <= room else f"…{shown[1 - room :]}", no_wrap=True)

    def lines(self, texts: Sequence[str]) -> None:
        for text in texts:
            self(printable(text))


def _guilty(blame: Blame, guilty: Guilty, say: _Printer) -> None:
    before, after = (next(p for p in blame.points if p.rewrites == n) for n in (guilty.number - 1, guilty.number))
    where = f" in {guilty.module}" if guilty.module else ""
    say(printable(f"Rewrite {guilty.number} breaks it: {guilty.rule} at '{guilty.node}'{where}"), "bold red")
    say(f"  pass {guilty.pass_index}, {guilty.key}" + (": even without a rewrite" if guilty.only_pass else ""))
    if guilty.detail:
        say(printable(f"  {guilty.detail}"))
    say(f"  before it  {_numbers(before.numerics)}")
    say(f"  after it   {_numbers(after.numerics)}")
    if guilty.share is not None and guilty.share < 0.5:
        say(f"  It adds {guilty.share:.0%} of the error: those before it had used up the rest of the budget")
        say("  (--sensitivity ranks them).")
    _finite(blame, say)
    if blame.appears is not None:
        say(f"\nThe error appears at {_described(blame.appears)} and goes on:")
        say.console.print(_growth(blame, say.name))
        say(f"  this rewrite  {sparkline(blame.growth, 80)}")
        say(f"  all of them   {sparkline(blame.total, 80)}")
    if blame.reproducer is not None:
        part = blame.reproducer
        say(f"\nReproducer: {part.nodes_before} of {part.nodes_of_graph} nodes, in {part.folder}")
        say(f"  {part.command}", "bold")


def _finite(blame: Blame, say: _Printer) -> None:
    error = blame.not_finite
    if error is None:
        return
    low, high = (value if value is not None else math.nan for value in error.expected)
    half = error.dtype == "float16" and max(abs(low), abs(high)) > LARGEST_FLOAT16
    why = f": beyond {LARGEST_FLOAT16}, where float16 ends" if half else ""
    say(f"  NaN or infinite first at {_described(error)},")
    say(f"  which ran from {low:.4g} to {high:.4g} before{why}")


def _described(error: TensorError) -> str:
    where = f", {error.module}" if error.module else ""
    return printable(f"'{error.tensor}' ({error.op} '{error.node}'{where})")


def _growth(blame: Blame, name: Callable[[str], Text]) -> Table:
    totals = {error.tensor: error for error in blame.total}
    table = Table("tensor", "made by", "module", "this rewrite", "all of them", "cosine", box=None, header_style="dim")
    for error in landmarks(blame.growth, ROWS):
        total = totals.get(error.tensor)
        table.add_row(
            name(error.tensor),
            name(error.op),
            name(error.module),
            _relative(error),
            "" if total is None else _relative(total),
            similarity(error.cosine) if error.finite else "",
        )
    return table


def _relative(error: TensorError) -> str:
    return difference(error.relative_l2) if error.finite else "not finite"


def _numbers(numerics: Sequence[OutputNumerics]) -> str:
    return "; ".join(_line(line) for line in numerics)


def _line(line: OutputNumerics) -> str:
    if not line.finite:
        return f"'{line.output}' NaN or infinite"
    return f"'{line.output}' cosine {similarity(line.cosine)}, relative L2 {difference(line.relative_l2)}"


def _sensitivity(found: Sensitivity, say: _Printer) -> None:
    say(f"\n{found.key}: what each layer alone costs, the worst first", "bold")
    table = Table("", "layer", "operator", "module", "cosine", "relative L2", box=None, header_style="dim")
    for rank, layer in enumerate(found.layers[:LAYERS], 1):
        worst = max(layer.numerics, key=lambda line: line.relative_l2 or 0.0)
        name, module = (
            Text(printable(text), overflow="ellipsis", no_wrap=True) for text in (layer.layer, layer.module)
        )
        table.add_row(str(rank), name, layer.op, module, similarity(worst.cosine), difference(worst.relative_l2))
    say.console.print(table)
    if len(found.layers) > LAYERS:
        say(f"  and {len(found.layers) - LAYERS} more in blame.json", "dim")
    for point in found.remaining:
        mark = "holds" if point.holds else "broken"
        say(f"  worst {point.kept:>3} kept: {_numbers(point.numerics)}  {mark}")
    if found.enough:
        ((parameter, names),) = found.setting.items()
        say(printable(f"Enough: --set 'passes.{found.key}.{parameter}={names}'"))


def render_reproduction(found: Reproduction, console: Console) -> None:
    """Print what a reproducer does now."""
    say = _Printer(console)
    guilty = found.guilty
    say(
        printable(f"rewrite {guilty.number}, {guilty.rule} at '{guilty.node}' ({guilty.key}), on its part of the graph")
    )
    say(f"  {_numbers(found.numerics)}")
    if found.breaches:
        say("It is still there:", "bold red")
        say.lines(found.breaches)
    else:
        say("It does not show any more.", "bold green")
