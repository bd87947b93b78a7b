"""The graph after each pass, as files: `00-load.onnx`, `01-fold-constants.onnx` …, over one file of weights."""

from __future__ import annotations

import hashlib
import os
import re
import weakref
from pathlib import Path

from llmc.compiler.errors import LlmcError
from llmc.compiler.pipeline import Step
from llmc.passes.graph import Array, Weights, append_aligned, raw_blocks, refer, to_structure

WEIGHTS = "weights.data"
_OURS = re.compile(rf"\d{{2,}}-[a-z0-9-]+\.onnx|{re.escape(WEIGHTS)}")

Region = tuple[int, int]
"""First byte and number of bytes in the file of weights."""


class PassDump:
    """Listens to a run and writes the graph of each step to a folder; what is there stays when the run fails.

    Weights of 1 KB and more are written once, however many steps have them: the graphs refer to one file.
    """

    def __init__(self, folder: Path, source: str = "") -> None:
        """Empty `folder` of an earlier dump. Raises LlmcError where it holds anything else, or the model `source`."""
        self.folder = folder
        self._regions: dict[int, tuple[weakref.ref[object], Region]] = {}
        self._by_content: dict[bytes, Region] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _empty(folder, source)
            (folder / WEIGHTS).touch()
        except OSError as error:
            raise LlmcError(f"--dump-passes: {folder} cannot be written: {error.strerror}") from error

    def __call__(self, step: Step) -> None:
        """Write the step's graph. Raises LlmcError where the disk does not take it."""
        structure = to_structure(step.graph)
        try:
            for tensor in structure.model.graph.initializer:
                if tensor.name in structure.weights:
                    refer(tensor, WEIGHTS, *self._region(structure.weights[tensor.name], tensor.data_type))
            path = self.folder / f"{step.index:02}-{step.key}.onnx"
            path.write_bytes(structure.model.SerializeToString(deterministic=True))
        except OSError as error:
            raise LlmcError(f"--dump-passes: {self.folder} cannot be written: {error.strerror}") from error

    def _region(self, values: Array | Weights, onnx_dtype: int) -> Region:
        """Where these values stand in the file of weights, written there if they are new."""
        known = self._regions.get(id(values))
        if known is not None and known[0]() is values:
            return known[1]
        sha = hashlib.sha256()
        for block in raw_blocks(values, onnx_dtype):
            sha.update(block)
        content = sha.digest()
        if content not in self._by_content:
            with (self.folder / WEIGHTS).open("r+b") as file:
                file.seek(0, os.SEEK_END)
                self._by_content[content] = append_aligned(file, values, onnx_dtype)
        self._regions[id(values)] = (weakref.ref(values), self._by_content[content])
        return self._by_content[content]


def _empty(folder: Path, source: str) -> None:
    if source and Path(source).resolve().is_relative_to(folder.resolve()):
        raise LlmcError(f"--dump-passes: {folder} holds the model itself; choose another folder")
    files = sorted(folder.iterdir())
    strange = next((path.name for path in files if not _OURS.fullmatch(path.name) or path.is_dir()), None)
    if strange is not None:
        raise LlmcError(f"--dump-passes: {folder} holds '{strange}', which is no part of a dump; choose another folder")
    for path in files:
        path.unlink()
