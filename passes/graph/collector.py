"""The garbage collector, where it is in the way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

FEW = 50_000
"""Objects made since the last collection that are not worth another one: a few MB."""
_alive = 0
"""Objects of the outermost block that were left by the last collection here, roughly."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """No cyclic garbage collection inside: while graphs are built and rewritten it finds little, and takes long.

    At the end of an inner block, garbage is collected if as many objects were made since the last time as were left
    then: a collection looks at every object, and so costs a node of a large graph no more than one of a small graph.
    It does not look at what was there before the outermost block, modules above all.
    """
    global _alive
    if not gc.isenabled():
        try:
            yield
        finally:
            _collect_if_due()
        return
    freezes = not gc.get_freeze_count()
    gc.disable()
    if freezes:
        gc.freeze()
    _alive = 0
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        gc.enable()


def collect() -> None:
    """Collect what garbage there is, due or not: for memory that is about to be needed."""
    global _alive
    made = gc.get_count()[0]
    _alive += made - gc.collect()


def _collect_if_due() -> None:
    if gc.get_count()[0] > max(_alive, FEW):
        collect()
