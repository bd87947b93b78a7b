"""What the benchmark found, as tables on the terminal.

python tests/bench/tables.py build/bench.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PYTHON_PEERS = ("onnxslim", "onnxsim", "onnxscript", "polygraphy")
"""The optimizers that a user calls from Python and that give standard ONNX, as llmc does."""


def print_all(results: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_versions(results["environment"]))
    console.print(_nodes(results["encoders"]))
    for export in _distinct(results["encoders"], "export"):
        timed = [row for row in results["encoders"] if row["export"] == export and row["model"] == "BERT-base"]
        console.print(_times(export, timed))
    console.print(_sizes(results["sizes"]))


def _versions(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"Python {environment['python']}, {environment['cpus']} CPUs; {versions}"


def _nodes(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Nodes left (Constant nodes not counted)", title_justify="left")
    table.add_column("model")
    table.add_column("export")
    table.add_column("given", justify="right")
    peers = [peer for peer in _distinct(rows, "peer") if peer != "llmc compile"]
    for peer in peers:
        table.add_column(peer, justify="right")
    for model in _distinct(rows, "model"):
        for export in _distinct(rows, "export"):
            found = {row["peer"]: row for row in rows if row["model"] == model and row["export"] == export}
            cells = [str(found[peer].get("nodes", "failed")) for peer in peers]
            table.add_row(model, export, str(found["llmc"]["nodes_before"]), *cells)
    return table


def _times(export: str, rows: list[dict[str, Any]]) -> Table:
    """The ratios are to the fastest of PYTHON_PEERS, imports included and not."""
    whole = {row["peer"]: row["imports_s"] + row["work_s"] for row in rows if "failed" not in row}
    work = {row["peer"]: row["work_s"] for row in rows if "failed" not in row}
    fastest_whole, fastest_work = (min(seconds[p] for p in PYTHON_PEERS if p in seconds) for seconds in (whole, work))
    table = Table(
        title=f"BERT-base, {export}: CPU time from file to file (1.00 x: the fastest Python peer)", title_justify="left"
    )
    for column in ("optimizer", "with imports s", "ratio", "without s", "ratio", "peak MB", "nodes"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in sorted(rows, key=lambda row: work.get(row["peer"], float("inf"))):
        peer = row["peer"]
        if "failed" in row:
            table.add_row(f"{peer} failed: {row['failed']}")
            continue
        table.add_row(
            peer + (", verified" if peer == "llmc compile" else ""),
            f"{whole[peer]:.2f}",
            f"{whole[peer] / fastest_whole:.2f} x",
            f"{work[peer]:.2f}",
            f"{work[peer] / fastest_work:.2f} x",
            f"{row['peak_bytes'] / 1e6:.0f}",
            str(row["nodes"]),
        )
    return table


def _sizes(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="llmc on generated graphs (1.00 x: the 10,000 nodes of the same kind)", title_justify="left")
    for column in ("graph", "nodes", "left", "s", "µs a node", "ratio", "peak MB"):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["kind"], f"{row['nodes_before']:,}", f"failed: {row['failed']}")
            continue
        middle = [r for r in rows if r["kind"] == row["kind"] and "failed" not in r][1]
        each, usual = (r["work_s"] / r["nodes_before"] for r in (row, middle))
        table.add_row(
            row["kind"],
            f"{row['nodes_before']:,}",
            f"{row['nodes']:,}",
            f"{row['work_s']:.2f}",
            f"{each * 1e6:.0f}",
            f"{each / usual:.2f} x",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    return table


def _distinct(rows: list[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


if __name__ == "__main__":
    print_all(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
