"""`llmc`, and `python -m llmc.compiler`."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line. While it is being imported there is nothing to clean up: Ctrl-C just ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from llmc.compiler.cli import main as run

    run()


if __name__ == "__main__":
    main()
