"""Draws docs/report.svg, the picture of the terminal report in the README, from an artifact: `make picture`."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from llmc.compiler.inspect import inspect, render


def main(artifact: Path) -> None:
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    render(inspect(artifact), console)
    svg = console.export_svg(title=f"llmc compile … -o {artifact}")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # no fonts from the network
    Path(__file__).with_name("report.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
