"""Large arrays worked on part by part, on every core: temporaries are of a part, never of the whole."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import TypeVar

Part = TypeVar("Part")
Found = TypeVar("Found")

PART = 1 << 20
"""Values that a core works on at a time."""
AHEAD = 4
"""Parts that are made at most while another one is used: each of them is in memory."""


def on_every_core(work: Callable[[Part], Found], parts: Iterable[Part]) -> list[Found]:
    """What `work` gives for each part, in their order; the same on any number of cores."""
    given = list(parts)
    if len(given) == 1:
        return [work(given[0])]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(work, given))


def ahead(work: Callable[[Part], Found], parts: Sequence[Part]) -> Iterator[Found]:
    """The same one after the other: while one is used, those that come next are made, and no others."""
    if len(parts) == 1:
        yield work(parts[0])
        return
    threads = min(len(os.sched_getaffinity(0)), AHEAD)
    with ThreadPoolExecutor(threads) as pool:
        begun = deque(pool.submit(work, part) for part in parts[:threads])
        for part in parts[threads:]:
            found = begun.popleft().result()
            begun.append(pool.submit(work, part))
            yield found
        while begun:
            yield begun.popleft().result()


def slices(size: int, step: int) -> list[slice]:
    """0 … `size` in slices of `step`, or 1 where that is less."""
    step = max(step, 1)
    return [slice(begin, min(begin + step, size)) for begin in range(0, size, step)]


def row_slices(shape: tuple[int, ...], values: int = PART) -> list[slice]:
    """Slices of the first axis that hold about so many values each; one of nothing where the axis is empty."""
    return slices(shape[0], values // max(prod(shape[1:]), 1)) or [slice(0, 0)]
