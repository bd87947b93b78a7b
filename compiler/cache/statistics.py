"""What calibration measured of a graph on its data: arrays by name, an entry each, that other passes find again."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmc.compiler.cache.memory import Memory
from llmc.passes.base import Measured

KIND = "statistics"


def recall(
    memory: Memory,
    parts: Sequence[object],
    wanted: Mapping[str, object],
    make: Callable[[Sequence[str]], Mapping[str, Measured]],
) -> dict[str, Measured]:
    """Name → what `make` gives for it, or gave before for the same `parts` and what `wanted` says of it.

    `make` is called once, with the names that are not known, and only where there are any.
    """
    found: dict[str, Measured] = {}
    for name, asked in wanted.items():
        known = _read(memory, (*parts, name, asked))
        if known is not None:
            found[name] = known
    missing = [name for name in wanted if name not in found]
    made = make(missing) if missing else {}
    for name, measured in made.items():
        _keep(memory, (*parts, name, wanted[name]), measured)
    return {name: found[name] if name in found else made[name] for name in wanted}


def _read(memory: Memory, parts: Sequence[object]) -> Measured | None:
    record = memory.find(KIND, *parts)
    if record is None or memory.store is None:
        return None
    with np.load(memory.store.blob(record.value["file"]), allow_pickle=False) as archive:
        return dict(archive)


def _keep(memory: Memory, parts: Sequence[object], measured: Measured) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **dict(measured))
    digest = memory.add(content.getvalue())
    if digest is not None:
        memory.keep(KIND, parts, {"file": digest}, [digest])
