"""What the source model makes of the samples: arrays, kept as one .npz file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmc.compiler.cache.memory import Memory
from llmc.passes.graph import Array

Outputs = list[dict[str, Array]]
"""For each sample, output name → value."""


def recall(memory: Memory, parts: Sequence[object], make: Callable[[], Outputs]) -> Outputs:
    """What `make` gives, or gave before for the same parts."""
    found = memory.find("outputs", *parts)
    if found is not None and memory.store is not None:
        with np.load(memory.store.blob(found.value["file"]), allow_pickle=False) as archive:
            arrays = [archive[f"arr_{number}"] for number in range(len(archive.files))]
        return _grouped(arrays, found.value["names"])
    made = make()
    if memory.store is not None and all(value.dtype.isbuiltin == 1 for sample in made for value in sample.values()):
        _keep(memory, parts, made)
    return made


def _keep(memory: Memory, parts: Sequence[object], made: Outputs) -> None:
    values = (value for sample in made for value in sample.values())
    digest = memory.add_written(lambda file: np.savez(file, *values))
    if digest is not None:
        memory.keep("outputs", parts, {"names": [list(sample) for sample in made], "file": digest}, [digest])


def _grouped(arrays: Sequence[Array], names: Sequence[Sequence[str]]) -> Outputs:
    values = iter(arrays)
    return [{name: next(values) for name in sample} for sample in names]
