"""Graph → ONNX file, weights copied from where they are: the model never stands in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import IO

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]

from llmc.passes.graph.edit import constant_bytes, constants
from llmc.passes.graph.file_copy import Wrote, append_bytes, append_region, link, nobody
from llmc.passes.graph.onnx_export import raw_blocks, refer, to_structure
from llmc.passes.graph.tensors import SMALL, Array, FileRegion, Graph, Structure, Weights

EXTERNAL_FROM = 256 << 20
"""Bytes of weights from which a saved model keeps them in a file of their own (protobuf ends at 2 GB)."""
Written = Callable[[str, int], None]
"""Called with a weight's name and the number of its bytes just written."""
ALIGNMENT = 4096
"""Bytes; a page, so that every tensor of an external data file can be mapped by itself."""


def save_model(
    graph: Graph,
    path: Path,
    *,
    inline_below: int | None = None,
    wrote: Written = lambda _name, _count: None,
    linked: Collection[Path] = (),
) -> list[Path]:
    """Write the model to `path`; returns the files written. `wrote` is told of each weight's bytes, a block at a time.

    Models whose weights are under `EXTERNAL_FROM` bytes stand in one file; larger ones, and all where `inline_below`
    is given, keep constants of `inline_below` bytes (by default 1 KB) or more in `<path>.data` beside it, each aligned
    to 4096 bytes so that it can be mapped. Weights are written one at a time; those that stand in a file are copied
    by the kernel, or left where they are if the file is in `linked`: then a link beside `path` stands for it.
    """
    external = inline_below is not None or bool(linked) or is_large(graph)
    structure = to_structure(graph, inline_below=SMALL if inline_below is None else inline_below)
    if not external or not structure.weights:
        with _beside(path) as file:
            _write_whole(structure, file, wrote)
        return [path]
    links, own = dict[Path, Path](), list[onnx.TensorProto]()
    for tensor in structure.model.graph.initializer:
        if tensor.name in structure.weights:
            held = structure.weights[tensor.name]
            region = linked_file(held, linked)
            if region is None:
                own.append(tensor)
            else:
                link_name = links.setdefault(region.path, _free_name(path, region.path, links.values()))
                refer(tensor, link_name.name, region.offset, held.nbytes)
    for source, name in links.items():
        link(source, name)
    data = path.with_name(path.name + ".data")
    if own:
        with _beside(data) as file:
            for tensor in own:
                held, told = structure.weights[tensor.name], partial(wrote, tensor.name)
                refer(tensor, data.name, *append_aligned(file, held, tensor.data_type, told))
    with _beside(path) as file:
        file.write(structure.model.SerializeToString(deterministic=True))
    return [path, *([data] if own else ()), *links.values()]


def linked_file(values: Array | Weights, linked: Collection[Path]) -> FileRegion | None:
    """Where these values stand, if in one of the `linked` files, and where a reader that maps it can use them."""
    region = values.region() if isinstance(values, Weights) else None
    stays = region is not None and region.path in linked and region.offset % values.dtype.itemsize == 0
    return region if stays else None


def _free_name(path: Path, source: Path, taken: Collection[Path]) -> Path:
    """'model.onnx.linked.model.safetensors', with a number where two sources have one name."""
    name = path.with_name(f"{path.name}.linked.{source.name}")
    return name if name not in taken else name.with_name(f"{path.name}.linked-{len(taken)}.{source.name}")


def is_large(graph: Graph) -> bool:
    """Whether the weights of a saved model stand in a file of their own."""
    return sum(map(constant_bytes, constants(graph))) >= EXTERNAL_FROM


def append_aligned(file: IO[bytes], values: Array | Weights, onnx_dtype: int, wrote: Wrote = nobody) -> tuple[int, int]:
    """Append a tensor's bytes to `file`, from the next multiple of `ALIGNMENT` on; where they begin, and how many."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    offset = file.tell()
    _append(file, values, onnx_dtype, wrote)
    return offset, file.tell() - offset


def _append(file: IO[bytes], values: Array | Weights, onnx_dtype: int, wrote: Wrote) -> None:
    """Append a tensor's bytes to `file`."""
    region = values.region() if isinstance(values, Weights) else None
    if isinstance(values, Weights) and region is not None:
        values.check()
        append_region(file, region, values.nbytes, wrote)
    else:
        for block in raw_blocks(values, onnx_dtype):
            append_bytes(file, block, wrote)


@contextmanager
def _beside(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is whole: the graph may have its weights mapped from there."""
    beside = path.with_name(f"{path.name}.partial")
    try:
        with beside.open("wb") as file:
            yield file
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _write_whole(structure: Structure, file: IO[bytes], wrote: Written) -> None:
    """The bytes that protobuf gives for the model with all weights inside: its fields in the order of their numbers.

    Source: https://protobuf.dev/programming-guides/encoding/ (a message in a message is its tag, its length, and it).
    """
    model = structure.model
    graph = model.graph
    tensors = [_Tensor(proto, structure.weights.get(proto.name)) for proto in graph.initializer]
    begin, end = _around(graph, "initializer")
    size = len(begin) + sum(tensor.size for tensor in tensors) + len(end)
    model.ClearField("graph")  # not to be copied
    model_begin, model_end = _around(model, "graph")
    file.writelines([model_begin, _head(model, "graph", size), begin])
    for tensor in tensors:
        file.write(tensor.start)
        if tensor.values is not None:
            _append(file, tensor.values, tensor.dtype, partial(wrote, tensor.name))
    file.writelines([end, model_end])


class _Tensor:
    """An initializer as it stands in a graph's bytes: `start`, and `values` last where its proto refers to them."""

    def __init__(self, proto: onnx.TensorProto, values: Array | Weights | None) -> None:
        self.name, self.values, self.dtype, length = proto.name, values, proto.data_type, 0
        if values is None:
            inner = proto.SerializeToString(deterministic=True)
        else:
            length = next(int(entry.value) for entry in proto.external_data if entry.key == "length")
            own = onnx.TensorProto(name=proto.name, data_type=proto.data_type, dims=proto.dims)
            inner = own.SerializeToString(deterministic=True) + _head(own, "raw_data", length)
        self.start = _head(onnx.GraphProto(), "initializer", len(inner) + length) + inner
        self.size = len(self.start) + length
        """Bytes in all."""


def _around(message: Message, name: str) -> tuple[bytes, bytes]:
    """What protobuf writes of a message before the field of this name, and after it."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    begin, end = deepcopy(message), deepcopy(message)
    for field, _ in message.ListFields():
        for part, dropped in ((begin, field.number >= number), (end, field.number <= number)):
            if dropped:
                part.ClearField(field.name)
    return begin.SerializeToString(deterministic=True), end.SerializeToString(deterministic=True)


def _head(message: Message, name: str, length: int) -> bytes:
    """The tag and the length that a field of bytes, or a message, begins with."""
    return _varint(message.DESCRIPTOR.fields_by_name[name].number << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
