"""Graph → ONNX file, weights copied from where they are: the model never stands in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import IO

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]

from llmc.passes.graph.edit import constant_bytes, constants
from llmc.passes.graph.onnx_export import raw_values, refer, to_structure
from llmc.passes.graph.tensors import SMALL, Array, Graph, Structure, Weights

EXTERNAL_FROM = 256 << 20
"""Bytes of weights from which a saved model keeps them in a file of their own (protobuf ends at 2 GB)."""
ALIGNMENT = 4096
"""Bytes; a page, so that every tensor of an external data file can be mapped by itself."""


def save_model(graph: Graph, path: Path, *, inline_below: int | None = None) -> list[Path]:
    """Write the model to `path`; returns the files written.

    Models whose weights are under `EXTERNAL_FROM` bytes stand in one file; larger ones, and all where `inline_below`
    is given, keep constants of `inline_below` bytes (by default 1 KB) or more in `<path>.data` beside it, each aligned
    to 4096 bytes so that it can be mapped. Weights are written one at a time.
    """
    external = inline_below is not None or sum(map(constant_bytes, constants(graph))) >= EXTERNAL_FROM
    structure = to_structure(graph, inline_below=SMALL if inline_below is None else inline_below)
    if not external or not structure.weights:
        with _beside(path) as file:
            _write_whole(structure, file)
        return [path]
    data = path.with_name(path.name + ".data")
    with _beside(data) as file:
        for tensor in structure.model.graph.initializer:
            if tensor.name in structure.weights:
                refer(tensor, data.name, *append_aligned(file, structure.weights[tensor.name], tensor.data_type))
    with _beside(path) as file:
        file.write(structure.model.SerializeToString(deterministic=True))
    return [path, data]


def append_aligned(file: IO[bytes], values: Array | Weights, onnx_dtype: int) -> tuple[int, int]:
    """Append a tensor's bytes to `file`, from the next multiple of `ALIGNMENT` on; where they begin, and how many."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    offset = file.tell()
    file.write(raw_values(values, onnx_dtype))
    return offset, file.tell() - offset


@contextmanager
def _beside(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is whole: the graph may have its weights mapped from there."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_whole(structure: Structure, file: IO[bytes]) -> None:
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
        file.writelines(tensor.parts())
    file.writelines([end, model_end])


class _Tensor:
    """An initializer as it stands in a graph's bytes: `values`, where its proto refers to them, come last."""

    def __init__(self, proto: onnx.TensorProto, values: Array | Weights | None) -> None:
        self.values, self.dtype, length = values, proto.data_type, 0
        if values is None:
            inner = proto.SerializeToString(deterministic=True)
        else:
            length = next(int(entry.value) for entry in proto.external_data if entry.key == "length")
            own = onnx.TensorProto(name=proto.name, data_type=proto.data_type, dims=proto.dims)
            inner = own.SerializeToString(deterministic=True) + _head(own, "raw_data", length)
        self.start = _head(onnx.GraphProto(), "initializer", len(inner) + length) + inner
        self.size = len(self.start) + length
        """Bytes in all."""

    def parts(self) -> Iterator[bytes | memoryview]:
        """The bytes, one after the other."""
        yield self.start
        if self.values is not None:
            yield raw_values(self.values, self.dtype)


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
