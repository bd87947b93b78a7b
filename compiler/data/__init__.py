"""Samples for calibration and verification: from the user's data, or random ones in the shape of the inputs."""

from __future__ import annotations

from pathlib import Path

from llmc.compiler.data.arrays import from_folder, from_rows
from llmc.compiler.data.bounds import index_bounds as index_bounds
from llmc.compiler.data.function import from_function
from llmc.compiler.data.generated import generate as generate
from llmc.compiler.data.generated import random_feeds as random_feeds
from llmc.compiler.data.images import from_images, is_image
from llmc.compiler.data.samples import Samples as Samples
from llmc.compiler.data.samples import Sizes as Sizes
from llmc.compiler.data.samples import graph_inputs
from llmc.compiler.data.text import from_text
from llmc.compiler.errors import LlmcError
from llmc.compiler.functions import is_function
from llmc.passes.graph import Graph


def from_path(
    path: Path,
    graph: Graph,
    tokenizer: Path | None = None,
    limit_sequence: int | None = None,
    processor: Path | None = None,
    count: int | None = None,
) -> Samples:
    """At most `count` samples from .npz files, images, text with one sample a line, or a Python function.

    An .npz file has one array per graph input, by its name. In a folder each file is a sample, in the order of their
    names; of a single file each row is, where all inputs share a symbolic first dimension. Text goes through
    `tokenizer` (a folder with tokenizer.json, or that file), cut at `limit_sequence` tokens; PNG and JPEG, each a
    sample, through the image processor in the folder `processor`. A folder with any .npz file is one of these. A
    function, FOLDER/module:function or FOLDER/file.py:function, yields dicts of arrays by input. Raises LlmcError where
    the data does not fit the graph.
    """
    if is_function(path):
        return from_function(path, graph, count)
    found = _from_files(path, graph, tokenizer, limit_sequence, processor)
    return found if count is None else found.first(count)


def _from_files(
    path: Path, graph: Graph, tokenizer: Path | None, limit_sequence: int | None, processor: Path | None
) -> Samples:
    if is_image(path) if path.is_file() else _holds_images(path):
        return from_images(path, graph, processor)
    if path.is_dir():
        return from_folder(path, graph_inputs(graph))
    if not path.is_file():
        raise LlmcError(f"{path} does not exist")
    if path.suffix == ".npz":
        return from_rows(path, graph_inputs(graph))
    return from_text(path, graph, tokenizer, limit_sequence)


def _holds_images(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.glob("*.npz")) and any(map(is_image, folder.iterdir()))
