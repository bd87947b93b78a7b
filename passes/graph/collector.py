"""The garbage collector, where it is in the way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

FEW = 300_000
"""Objects made since the last collection that are not worth another one."""
_alive = 0
"""Objects that were left by the last collection here, roughly."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """No cyclic garbage collection inside: while graphs are built and rewritten it finds little, and takes long.

    At the end of a block, garbage is collected if as many objects were made since the last time as were left then: a
    collection looks at every object, and so costs a node of a large graph no more than one of a small graph.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        _collect_if_due()
        if running:
            gc.enable()


def _collect_if_due() -> None:
    global _alive
    made = gc.get_count()[0]
    if made > max(_alive, FEW):
        _alive += made - gc.collect()
