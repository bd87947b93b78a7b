"""Processes of llmc's own that do one job: how they ended, and that they end with whoever started them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

_KILLED = {
    signal.SIGKILL: "was killed (SIGKILL), most often because memory ran out",
    signal.SIGABRT: "aborted (SIGABRT)",
    signal.SIGSEGV: "crashed (SIGSEGV)",
    signal.SIGBUS: "crashed (SIGBUS), most often because the disk is full",
}


def how_it_ended(signal_number: int) -> str:
    """What a signal did to a process, and why most often."""
    return _KILLED.get(signal.Signals(signal_number), f"was ended by {signal.Signals(signal_number).name}")


def end_with_parent(last: Callable[[], object] = lambda: None) -> None:
    """Have this process end, without a word, when its standard input closes, because the parent is gone.

    `last` is done before that. Nothing else may read standard input from now on.
    """

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        last()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
