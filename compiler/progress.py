"""What goes on, for whoever watches: phases, and within a long one bytes, pieces and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

Progress = Callable[[str], None]
"""Called with what goes on ('exporting', 'writing the model: 1.2 GB of 13.5 GB …'); may be called from a thread."""
_INTERVAL = 0.5
"""Seconds between two words about one phase; of a shorter one only its name is heard."""


def quiet(_phase: str) -> None:
    """Nobody watches."""


class Counted:
    """A phase in bytes: called with what is worked on and the bytes of it just done, it tells how far it has come."""

    def __init__(self, progress: Progress, phase: str, total: int | None, pieces: int | None, noun: str) -> None:
        """`total` bytes in so many `pieces`, None where nobody knows; `noun` is what one is called ('weight')."""
        self.progress, self.phase, self.total, self.pieces, self.noun = progress, phase, total, pieces, noun
        self.done = self.reached = 0
        self._piece: str | None = None
        self._begun = self._told = time.monotonic()
        progress(phase)

    def __call__(self, piece: str, count: int) -> None:
        """`count` more bytes of `piece` are done; pieces come one after the other."""
        self.reached += piece != self._piece
        self._piece, self.done = piece, self.done + count
        now = time.monotonic()
        if now - self._told >= _INTERVAL:
            self._told = now
            self.progress(self._text(now - self._begun))

    def _text(self, spent: float) -> str:
        from llmc.compiler.report.text import scaled, seconds

        if self.total is None or self.pieces is None:
            return f"{self.phase}: {scaled(self.done, 'B')}, {self.reached:,} {self.noun}s"
        left = spent / self.done * max(self.total - self.done, 0) if self.done else None
        place = f"{self.noun} {self.reached:,} of {self.pieces:,}"
        text = f"{self.phase}: {scaled(self.done, 'B')} of {scaled(self.total, 'B')}, {place}"
        if left is None:
            return text
        return f"{text}, {f'{left:.0f} s' if left < 60 else seconds(left)} left"


@cache
def error_console() -> Any:
    """The one console of the error stream: lines that it prints do not disturb the progress it shows."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def shown() -> Iterator[Progress]:
    """Shows what goes on on the error stream, where that is a terminal; quiet elsewhere."""
    console = error_console()
    if not console.is_terminal:
        yield quiet
        return
    from rich.markup import escape

    with console.status("starting") as status:
        yield lambda phase: status.update(escape(phase))
