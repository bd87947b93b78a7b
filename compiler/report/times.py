"""Where the time of a compile went: `--time-passes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.compiler.report import Timings
from llmc.compiler.report.text import CACHED

if TYPE_CHECKING:
    from rich.console import Console


def rows(timings: Timings) -> list[tuple[str, float, float]]:
    """(step, its own seconds, seconds of its verification) in the order of the run; 'other' is what is left of all."""
    named = [name for name in timings.steps if name != "verify"]
    named += [name for name in timings.verification if name not in timings.steps]
    found = [(name, timings.steps.get(name, 0.0), timings.verification.get(name, 0.0)) for name in named]
    rest = timings.total - sum(own + verification for _, own, verification in found)
    return [*found, ("other", max(rest, 0.0), 0.0)]


def render(timings: Timings, console: Console) -> None:
    """Print the table: seconds and percent of each step, and of verifying it; where it was cached, of looking it up."""
    from rich.table import Table

    total = timings.total or 1.0
    table = Table(box=None, pad_edge=False, header_style="dim", show_footer=True, footer_style="bold")
    table.add_column("Step", "total")
    table.add_column("Seconds", f"{timings.total:.3f}", justify="right")
    table.add_column("%", "100.0", justify="right")
    table.add_column("Verifying it", f"{sum(timings.verification.values()):.3f}", justify="right")
    table.add_column("%", f"{100 * sum(timings.verification.values()) / total:.1f}", justify="right")
    for name, own, verification in rows(timings):
        measured = (f"{verification:.3f}", f"{100 * verification / total:.1f}") if verification else ("", "")
        shown = f"{name} ({CACHED})" if name in timings.cached else name
        table.add_row(shown, f"{own:.3f}", f"{100 * own / total:.1f}", *measured)
    console.print(table)
