"""Samples that a tokenizer makes of text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.data.bounds import index_bounds
from llmc.compiler.data.samples import Samples, graph_inputs
from llmc.compiler.digest import digest_files
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Feeds
from llmc.passes.graph import Array, Graph, Tensor, shape_of


def from_text(path: Path, graph: Graph, tokenizer: Path | None, limit_sequence: int | None) -> Samples:
    lines = _read_lines(path)
    if tokenizer is None:
        raise LlmcError(f"{path} is text, and the model brings no tokenizer: give --tokenizer DIR")
    file = tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json"
    encode = Encoder(path, file, graph, limit_sequence)
    digest = digest_files({path.name: path, file.name: file})
    if limit_sequence is not None:
        digest = hashlib.sha256(f"{digest} cut at {limit_sequence}".encode()).hexdigest()
    return Samples(path.name, digest, False, len(lines), lambda: starmap(encode, lines))


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of each line that is not blank."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LlmcError(f"{path} is neither an .npz file nor UTF-8 text (line {line}, byte {error.start})") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise LlmcError(f"{path} is empty: it needs one sample a line")
    return lines


class Encoder:
    """One line of text → the graph's inputs, batch 1, as long as the text is (or as long as the graph insists on)."""

    def __init__(self, path: Path, file: Path, graph: Graph, limit: int | None) -> None:
        self.path = path
        self.file = file
        self.vocabulary = index_bounds(graph).get("input_ids")
        self.inputs = {tensor.name: tensor for tensor in graph_inputs(graph)}
        self.length = _fixed_length(path, self.inputs)
        self.tokenizer = _open_tokenizer(file)
        self.pad = _pad_id(self.tokenizer)
        self.tokenizer.no_padding()
        limit = min(filter(None, (limit, self.length)), default=None)
        if limit is None:
            self.tokenizer.no_truncation()
        else:
            _limit_length(self.tokenizer, limit)

    def __call__(self, number: int, line: str, pair: str | None = None) -> Feeds:
        """The inputs for one text, or for two that the model takes together; `number` is its line's in the file."""
        encoding = self.tokenizer.encode(line, pair)
        ids = encoding.ids
        if not ids:
            raise LlmcError(f"{self.path}, line {number}: the tokenizer {self.file} makes no tokens of it")
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            raise LlmcError(
                f"{self.file} is not this model's tokenizer: it gives token {max(ids)}, "
                f"the model knows tokens 0 to {self.vocabulary - 1}"
            )
        values = {
            "input_ids": (ids, self.pad),
            "attention_mask": (encoding.attention_mask, 0),
            "token_type_ids": (encoding.type_ids, 0),
            "position_ids": (range(len(ids)), 0),
        }
        rows = {name: self._row(*values[name], np.dtype(t.dtype)) for name, t in self.inputs.items() if name in values}
        return rows | {name: _no_past(tensor) for name, tensor in self.inputs.items() if is_past(name)}

    def _row(self, values: Sequence[int], fill: int, dtype: np.dtype[Any]) -> Array:
        row = np.full((1, self.length or len(values)), fill, dtype=dtype)
        row[0, : len(values)] = values
        return row


def is_past(name: str) -> bool:
    """Whether an input holds keys or values of a decoder's earlier tokens, as optimum and llmc name them: not those of
    what an encoder has read."""
    return name.startswith("past_key_values.") and ".encoder." not in name


def _no_past(tensor: Tensor) -> Array:
    """A cache, [batch, heads, length, width], before the first token of one text."""
    batch, heads, _, width = tensor.shape
    return np.zeros((1 if isinstance(batch, str) else batch, heads, 0, width), tensor.dtype)


TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""The inputs that a tokenizer can fill."""


def _fixed_length(path: Path, inputs: Mapping[str, Tensor]) -> int | None:
    """The number of tokens that the graph insists on, if it does; refuses graphs that text cannot feed."""
    lengths = set()
    for name, tensor in inputs.items():
        shape = shape_of(tensor)
        if is_past(name) and shape is not None and len(shape) == 4:
            continue
        if name not in TEXT_INPUTS or shape is None or len(shape) != 2:
            raise LlmcError(
                f"{path} is text, which cannot fill the model's input '{name}': give a folder of .npz files"
            )
        if isinstance(shape[0], int) and shape[0] != 1:
            raise LlmcError(
                f"{path} is text, one sample a line, but the model's batch is fixed at {shape[0]}: give .npz"
            )
        lengths.add(shape[1] if isinstance(shape[1], int) else None)
    if len(lengths) > 1:
        raise LlmcError(f"{path} is text, but the model's inputs differ in length: give a folder of .npz files")
    return lengths.pop() if lengths else None


def _open_tokenizer(file: Path) -> Any:
    from tokenizers import Tokenizer

    if not file.is_file():
        raise LlmcError(
            f"there is no {file}; where a tokenizer has other files, transformers makes one: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise LlmcError(f"{file} is not a tokenizer that the tokenizers library reads: {error}") from error


def _limit_length(tokenizer: Any, limit: int) -> None:
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if limit <= special:
        raise LlmcError(f"{limit} tokens leave no room for text: the tokenizer adds {special} of its own")
    tokenizer.enable_truncation(max_length=limit)


def _pad_id(tokenizer: Any) -> int:
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    found = (tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>", "<|endoftext|>"))
    return next((int(token) for token in found if token is not None), 0)
