"""Samples for calibration and verification: from the user's data, or random ones in the shape of the inputs."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Feeds, digest_files
from llmc.passes.graph import Array, Constant, Graph, Tensor, Variable, shape_of

Sizes = Mapping[str, int]
"""Symbolic dimension → its size."""


@dataclass(frozen=True)
class Samples:
    """A set of samples: one run's inputs each, made anew every time the set is gone through.

    A sample of a model with a batch dimension has batch 1 and no padding where the data allows it, so that
    statistics depend neither on how samples are batched nor on their order.
    """

    name: str
    """The file or folder, or 'random inputs'."""
    digest: str
    """SHA-256 of what the samples are made from."""
    random: bool
    """True where they were drawn, and say nothing about real data."""
    count: int
    make: Callable[[int], Feeds]
    """The sample of an index below `count`."""

    def __len__(self) -> int:
        return self.count

    def first(self, count: int) -> Samples:
        """The first `count` samples; all of them where there are no more."""
        return replace(self, count=min(count, self.count))

    def __iter__(self) -> Iterator[Feeds]:
        return map(self.make, range(self.count))


def from_path(path: Path, graph: Graph, tokenizer: Path | None = None, limit_sequence: int | None = None) -> Samples:
    """Samples from a folder of .npz files, one .npz file, or a text file with one sample a line.

    An .npz file has one array per graph input, by its name. In a folder each file is a sample, in the order of their
    names; of a single file each row is, where all inputs share a symbolic first dimension. Text goes through
    `tokenizer` (a folder with tokenizer.json, or that file), cut at `limit_sequence` tokens. Raises LlmcError where
    the data does not fit the graph.
    """
    if path.is_dir():
        return _from_folder(path, _inputs(graph))
    if not path.is_file():
        raise LlmcError(f"{path} does not exist")
    if path.suffix == ".npz":
        return _from_rows(path, _inputs(graph))
    return _from_text(path, graph, tokenizer, limit_sequence)


def _inputs(graph: Graph) -> list[Tensor]:
    """The inputs as they are now; passes that change the graph later do not change the samples."""
    return [Variable(tensor.name, dtype=tensor.dtype, shape=tensor.shape) for tensor in graph.inputs]


# .npz


def _from_folder(path: Path, inputs: Sequence[Tensor]) -> Samples:
    files = sorted(path.glob("*.npz"))
    if not files:
        raise LlmcError(f"{path} holds no .npz files")
    for file in files:
        _read_npz(file, inputs)
    digest = digest_files({file.name: file for file in files})
    return Samples(path.name, digest, False, len(files), lambda number: _read_npz(files[number], inputs))


def _from_rows(path: Path, inputs: Sequence[Tensor]) -> Samples:
    feeds = _read_npz(path, inputs)
    digest = digest_files({path.name: path})
    if not _has_common_batch(inputs):
        return Samples(path.name, digest, False, 1, lambda _: feeds)
    rows = next(iter(feeds.values())).shape[0]
    if not rows:
        raise LlmcError(f"{path} holds no samples: its arrays have 0 rows")

    def make(number: int) -> Feeds:
        return {name: array[number : number + 1] for name, array in feeds.items()}

    return Samples(path.name, digest, False, rows, make)


def _has_common_batch(inputs: Sequence[Tensor]) -> bool:
    firsts = {(shape_of(tensor) or (None,))[0] for tensor in inputs}
    return len(firsts) == 1 and isinstance(firsts.pop(), str)


def _read_npz(path: Path, inputs: Sequence[Tensor]) -> dict[str, Array]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise LlmcError(f"{path} is a single array (.npy), not an .npz file with one array per input")
            missing = [tensor.name for tensor in inputs if tensor.name not in archive.files]
            if missing:
                raise LlmcError(
                    f"{path} has no array '{missing[0]}' for that input; it has: {', '.join(archive.files)}"
                )
            arrays = {tensor.name: archive[tensor.name] for tensor in inputs}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise LlmcError(f"{path} is not an .npz file of plain arrays: {error}") from error
    sizes: dict[str, tuple[str, int]] = {}
    return {tensor.name: _fit(arrays[tensor.name], tensor, path, sizes) for tensor in inputs}


def _fit(array: Array, tensor: Tensor, path: Path, sizes: dict[str, tuple[str, int]]) -> Array:
    """The array in the input's dtype, once its dtype and shape are found to fit."""
    where = f"{path}: array '{tensor.name}'"
    if tensor.dtype is not None and not np.can_cast(array.dtype, tensor.dtype, "safe"):
        raise LlmcError(f"{where} is {array.dtype}, the model takes {np.dtype(tensor.dtype)}; save it as that")
    shape = shape_of(tensor)
    if shape is not None:
        if array.ndim != len(shape):
            raise LlmcError(f"{where} has shape {array.shape}, the model takes {len(shape)} dimensions {_text(shape)}")
        for axis, (size, wanted) in enumerate(zip(array.shape, shape, strict=True)):
            if isinstance(wanted, int) and size != wanted:
                raise LlmcError(f"{where} has shape {array.shape}, but axis {axis} must be {wanted} in {_text(shape)}")
            if isinstance(wanted, str):
                other, known = sizes.setdefault(wanted, (tensor.name, size))
                if known != size:
                    raise LlmcError(f"{where}: '{wanted}' is {size}, but {known} in array '{other}'")
    return array if tensor.dtype is None else array.astype(tensor.dtype, copy=False)


def _text(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


# Text


def _from_text(path: Path, graph: Graph, tokenizer: Path | None, limit_sequence: int | None) -> Samples:
    lines = _read_lines(path)
    if tokenizer is None:
        raise LlmcError(f"{path} is text, and the model brings no tokenizer: give --tokenizer DIR")
    file = tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json"
    encode = _Encoder(path, file, graph, limit_sequence)
    digest = digest_files({path.name: path, file.name: file})
    return Samples(path.name, digest, False, len(lines), lambda number: encode(*lines[number]))


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


class _Encoder:
    """One line of text → the graph's inputs, batch 1, as long as the text is (or as long as the graph insists on)."""

    def __init__(self, path: Path, file: Path, graph: Graph, limit: int | None) -> None:
        self.path = path
        self.file = file
        self.vocabulary = index_bounds(graph).get("input_ids")
        self.inputs = {tensor.name: tensor for tensor in _inputs(graph)}
        self.length = _fixed_length(path, self.inputs)
        self.tokenizer = _open_tokenizer(file)
        self.pad = _pad_id(self.tokenizer)
        self.tokenizer.no_padding()
        limit = min(filter(None, (limit, self.length)), default=None)
        if limit is None:
            self.tokenizer.no_truncation()
        else:
            _limit_length(self.tokenizer, limit)

    def __call__(self, number: int, line: str) -> Feeds:
        encoding = self.tokenizer.encode(line)
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
        return {name: self._row(*values[name], np.dtype(tensor.dtype)) for name, tensor in self.inputs.items()}

    def _row(self, values: Sequence[int], fill: int, dtype: np.dtype[Any]) -> Array:
        row = np.full((1, self.length or len(values)), fill, dtype=dtype)
        row[0, : len(values)] = values
        return row


TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""The inputs that a tokenizer can fill."""


def _fixed_length(path: Path, inputs: Mapping[str, Tensor]) -> int | None:
    """The number of tokens that the graph insists on, if it does; refuses graphs that text cannot feed."""
    lengths = set()
    for name, tensor in inputs.items():
        shape = shape_of(tensor)
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


# Random


def generate(
    graph: Graph, sizes: Sequence[Sizes], *, vocabulary: int | None = None, seed: int = 0, count: int = 16
) -> Samples:
    """`count` random samples in the shapes of the graph's inputs, going through `sizes` in turn.

    What a value may be is read off the graph (the rows of the table that an input indexes) and the input's
    name: token ids below `vocabulary`, masks of ones whose later rows end in padding, positions in order;
    floats are normal. The same arguments give the same samples.
    """
    bounds = index_bounds(graph)
    if vocabulary is not None:
        bounds["input_ids"] = min(vocabulary, bounds.get("input_ids", vocabulary))
    inputs = _inputs(graph)
    for given in sizes:
        _check_sizes(inputs, given)
    described = [(t.name, str(t.dtype), shape_of(t), bounds.get(t.name)) for t in inputs]
    recipe = repr((described, [sorted(given.items()) for given in sizes], seed, count))

    def make(number: int) -> Feeds:
        return random_feeds(inputs, sizes[number % len(sizes)], bounds, np.random.default_rng([seed, number]))

    return Samples("random inputs", hashlib.sha256(recipe.encode()).hexdigest(), True, count, make)


def random_feeds(
    inputs: Sequence[Tensor], sizes: Sizes, bounds: Mapping[str, int], rng: np.random.Generator
) -> dict[str, Array]:
    """One random sample; integers of an input stay below its entry in `bounds`."""
    feeds = {}
    for tensor in inputs:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
        feeds[tensor.name] = _random(tensor.name, np.dtype(tensor.dtype), shape, bounds.get(tensor.name), rng)
    return feeds


def _random(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], bound: int | None, rng: np.random.Generator
) -> Array:
    if "mask" in name:
        return _mask(shape, rng).astype(dtype)
    if dtype.kind not in "iub":
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    return rng.integers(0, bound or (256 if dtype == np.uint8 else 2), size=shape).astype(dtype)


def _mask(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Ones; of a [rows, length] mask, rows after the first end in zeros, over half the length at most."""
    mask = np.ones(shape, dtype=np.int64)
    if len(shape) == 2:
        rows, length = shape
        kept = rng.integers((length + 1) // 2, length + 1, size=rows)
        kept[0] = length
        mask[np.arange(length) >= kept[:, None]] = 0
    return mask


def _check_sizes(inputs: Sequence[Tensor], sizes: Sizes) -> None:
    for tensor in inputs:
        shape = shape_of(tensor)
        if shape is None or tensor.dtype is None or np.dtype(tensor.dtype).kind not in "iubfV":
            raise LlmcError(f"random values cannot be made for input '{tensor.name}': give data with --calibration")
        for axis, size in enumerate(shape):
            if not isinstance(size, int) and size not in sizes:
                raise LlmcError(
                    f"no size is given for dimension {axis if size is None else repr(size)} of input '{tensor.name}'"
                )


# What inputs may hold

_MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def index_bounds(graph: Graph) -> dict[str, int]:
    """Input name → rows of the smallest table that it indexes (Gather along axis 0): its values stay below that."""
    bounds = {}
    for tensor in graph.inputs:
        tables = list(_tables(tensor))
        if tables:
            bounds[tensor.name] = min(tables)
    return bounds


def _tables(indices: Tensor) -> Iterator[int]:
    for node in indices.outputs:
        if node.op == "Gather" and node.inputs[1] is indices and isinstance(node.inputs[0], Constant):
            if node.attrs.get("axis", 0) == 0:
                yield node.inputs[0].shape[0]
        elif node.op in _MOVES and node.inputs[0] is indices:
            yield from _tables(node.outputs[0])
