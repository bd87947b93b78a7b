"""Ctrl-C and SIGTERM: an interrupt at a moment at which Python code can clean up, and never one that is lost."""

from __future__ import annotations

import signal
import sys
from types import FrameType

AGAIN = 0.01
"""Seconds after which an interrupt that came at a bad moment comes again."""


class Interruption:
    """Turns signals to KeyboardInterrupt, once no module is being imported, and remembers that there was one."""

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    seen = False

    def __call__(self, _number: int, frame: FrameType | None) -> None:
        self.seen = True
        if _importing(frame):  # C code would turn it to an error of its own, and print that
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            raise KeyboardInterrupt

    def listen(self) -> None:
        """From now on Ctrl-C and SIGTERM interrupt."""
        for number in self.signals:
            signal.signal(number, self)
        sys.unraisablehook = self._unraisable

    def end(self) -> None:
        """From now on nothing is left to interrupt: the exit code stays what it is."""
        for number in self.signals:
            signal.signal(number, signal.SIG_IGN)

    def _unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised in a destructor or a callback: an interrupt comes again, in a moment."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            sys.__unraisablehook__(unraisable)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame or one that called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
