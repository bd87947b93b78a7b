"""What an encoder reads, from files: arrays as they stand, or sound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llmc.compiler.data.arrays import from_rows
from llmc.compiler.data.fit import fit
from llmc.compiler.errors import LlmcError
from llmc.compiler.generation.decoder import Input
from llmc.compiler.loaders import Feeds
from llmc.compiler.loaders.sound import SoundProcessor
from llmc.passes.graph import Array, Variable


def read_inputs(files: Sequence[Path], reads: Sequence[Input], processor: Path) -> tuple[Feeds, list[str]]:
    """The inputs of an encoder, a row for each prompt, and what each is called.

    A .wav file is one prompt, prepared as the folder `processor` says; an .npz file has an array for each input, of as
    many prompts as it has rows. Raises LlmcError for other files, and for what does not fit the encoder.
    """
    inputs = [Variable(given.name, dtype=given.dtype, shape=list(given.shape)) for given in reads]
    rows: list[Feeds] = []
    names: list[str] = []
    for file in files:
        found = list(_rows(file, inputs, processor))
        rows += found
        names += [file.name] if len(found) == 1 else [f"{file.name}, row {row}" for row in range(len(found))]
    return {tensor.name: _stacked(tensor.name, [feeds[tensor.name] for feeds in rows]) for tensor in inputs}, names


def _rows(file: Path, inputs: Sequence[Variable], processor: Path) -> Iterator[Feeds]:
    if file.suffix == ".npz":
        yield from from_rows(file, inputs)
    elif file.suffix.lower() != ".wav":
        raise LlmcError(f"{file} is neither .npz nor .wav, which --input takes")
    elif inputs[0].name == "input_ids":
        raise LlmcError(f"{file} is sound, and the model reads text: give --prompt or --prompts")
    else:
        types = {tensor.name: tensor.dtype for tensor in inputs}
        made = SoundProcessor(processor)(file)
        yield fit({name: value.astype(types.get(name, value.dtype)) for name, value in made.items()}, inputs, file)


def _stacked(name: str, rows: Sequence[Array]) -> Array:
    sizes = sorted({row.shape[1:] for row in rows})
    if len(sizes) > 1:
        raise LlmcError(f"array '{name}' is {sizes[0]} in one row and {sizes[1]} in another: give the files one by one")
    return np.concatenate(rows)
