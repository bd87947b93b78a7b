"""Tensors, weights and nodes: the words that everything else about graphs is said in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner

from llmc.passes.graph.in_parts import ahead, on_every_core, row_slices
from llmc.passes.graph.nodes import Array as Array
from llmc.passes.graph.nodes import Constant as Constant
from llmc.passes.graph.nodes import Graph as Graph
from llmc.passes.graph.nodes import Node as Node
from llmc.passes.graph.nodes import Tensor as Tensor
from llmc.passes.graph.nodes import Variable as Variable

Shape = tuple[int | str | None, ...]

SMALL = 1024
"""Bytes. Smaller constants always stand inside the graph proto; larger ones may stay in a file."""
BEGINNING = 1024
"""Values of a weight that are compared with another's before all are."""
BLOCK = 16 << 20
"""Bytes of a large weight that are worked on at a time, where they can be."""
COMPUTED = 8 << 20
"""Bytes, in float32, of a weight that a core computes at a time."""
STRIP = 256
"""Columns of a transposed array that are copied at a time: their rows' lines stay in the processor's cache."""
FOUR_BIT = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1}


class Weights:
    """The values of a constant, left where they are (a file, or the proto that was loaded) until asked for.

    `load()` gives a read-only array that views the file's pages: reading weights costs no anonymous memory.
    """

    def __init__(self, onnx_dtype: int, shape: tuple[int, ...], source: FileRegion | onnx.TensorProto) -> None:
        self.onnx_dtype = onnx_dtype
        self.shape = shape
        self.dtype = numpy_dtype(onnx_dtype)
        self.source = source
        self.nbytes = stored_bytes(onnx_dtype, prod(shape))

    def region(self) -> FileRegion | None:
        """Where the bytes stand in a file just as ONNX stores them; None where they are in memory, or made anew."""
        return self.source if isinstance(self.source, FileRegion) and self.nbytes else None

    def origin(self) -> tuple[FileRegion, str] | None:
        """The bytes in a file that the values follow from, and how; None where they follow from others."""
        region = self.region()
        return None if region is None else (region, "")

    @cached_property
    def beginning(self) -> bytes:
        """Of the values: tells most weights apart, and is read, or computed, once."""
        return beginning(self.rows(slice(0, -(-BEGINNING // max(prod(self.shape[1:]), 1)))))

    def check(self) -> None:
        """See that the bytes are still those that they were, where that can be told; `load` does it by itself."""

    def load(self) -> Array:
        """The values, shaped and typed; a view of mapped pages where the layout allows it."""
        if isinstance(self.source, onnx.TensorProto):
            if self.source.HasField("raw_data") and self.onnx_dtype not in FOUR_BIT and self.nbytes:
                return np.frombuffer(self.source.raw_data, dtype=self.dtype).reshape(self.shape)
            return cast(Array, onnx.numpy_helper.to_array(self.source))
        if not self.nbytes:
            return np.empty(self.shape, dtype=self.dtype)
        raw: Array = np.memmap(
            self.source.path, dtype=np.uint8, mode="r", offset=self.source.offset, shape=(self.nbytes,)
        )
        if self.onnx_dtype in FOUR_BIT:
            return unpack_four_bit(raw, self.dtype, self.shape)
        return raw.view(self.dtype).reshape(self.shape)

    def rows(self, rows: slice) -> Array:
        """Some rows, that is what the first axis numbers, and no others are read; a scalar is all that there is."""
        values = self.load()
        return values[rows] if values.ndim else values

    def blocks(self) -> Iterator[Array]:
        """The values from first to last in arrays of some `BLOCK` bytes: rows, or a single one."""
        return in_blocks(self.load())


def in_blocks(values: Array) -> Iterator[Array]:
    """Views of an array, row by row, of `BLOCK` bytes or a single row each; the whole where it is no larger."""
    if values.nbytes <= BLOCK or not values.ndim:
        yield values
        return
    rows = max(1, BLOCK * len(values) // values.nbytes)
    for begin in range(0, len(values), rows):
        yield values[begin : begin + rows]


def contiguous(values: Array) -> Array:
    """`np.ascontiguousarray`; of a transposed matrix some six times as fast."""
    if values.flags.c_contiguous or values.ndim != 2 or values.strides[0] >= values.strides[1]:
        return values if values.flags.c_contiguous else np.ascontiguousarray(values)
    made = np.empty(values.shape, values.dtype)
    for begin in range(0, values.shape[1], STRIP):
        made[:, begin : begin + STRIP] = values[:, begin : begin + STRIP]
    return made


def rows_of(held: Array | Weights, rows: slice) -> Array:
    """`Weights.rows` of values, wherever they are held."""
    if isinstance(held, Weights):
        return held.rows(rows)
    return held[rows] if held.ndim else held


def blocks_of(held: Array | Weights) -> Iterator[Array]:
    """`Weights.blocks` of values, wherever they are held."""
    return held.blocks() if isinstance(held, Weights) else in_blocks(held)


def beginning(held: Array | Weights) -> bytes:
    """The first `BEGINNING` values, as NumPy holds them."""
    return held.beginning if isinstance(held, Weights) else held.flat[:BEGINNING].tobytes()


def loaded(held: Array | Weights) -> Array:
    """The values, wherever they are held."""
    return held.load() if isinstance(held, Weights) else held


class Derived(Weights):
    """Values made from other values each time they are asked for: a large result takes no memory while nobody reads it.

    `make` gives an array of this type and shape, and the same one every time.
    """

    def __init__(self, onnx_dtype: int, shape: tuple[int, ...], make: Callable[[], Array]) -> None:
        super().__init__(onnx_dtype, shape, onnx.TensorProto())
        self.make = make

    def load(self) -> Array:
        return self.make()


class Rowwise(Derived):
    """Values whose rows do not depend on one another: made some rows at a time, on every core, and written so.

    `make_rows` gives the rows of a slice of the first axis (of a scalar all that there is), the same ones every time.
    """

    def __init__(self, onnx_dtype: int, shape: tuple[int, ...], make_rows: Callable[[slice], Array]) -> None:
        super().__init__(onnx_dtype, shape, self._whole)
        self._make_rows = make_rows

    def rows(self, rows: slice) -> Array:
        return self._make_rows(rows)

    def blocks(self) -> Iterator[Array]:
        return ahead(self._make_rows, self._parts())

    def _parts(self) -> list[slice]:
        return row_slices(self.shape, COMPUTED // 4) if self.shape else [slice(None)]

    def _whole(self) -> Array:
        parts = self._parts()
        if len(parts) == 1:
            return self._make_rows(parts[0])
        whole = np.empty(self.shape, self.dtype)

        def put(rows: slice) -> None:
            whole[rows] = self._make_rows(rows)

        on_every_core(put, parts)
        return whole


class Elementwise(Rowwise):
    """Values that are each made from the one at its place in `source`.

    `change` gives for rows of the source an array of their shape and of this type.
    """

    def __init__(self, onnx_dtype: int, source: Array | Weights, change: Callable[[Array], Array]) -> None:
        super().__init__(onnx_dtype, tuple(source.shape), lambda rows: change(contiguous(rows_of(source, rows))))


@dataclass(frozen=True)
class FileRegion:
    """Where a tensor's bytes stand in a file: `offset` in bytes from its start."""

    path: Path
    offset: int


@dataclass(frozen=True)
class Structure:
    """A model without its large weights: the proto refers to them as external data, `weights` has them by name."""

    model: onnx.ModelProto
    weights: Mapping[str, Array | Weights]


def unpack_four_bit(raw: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Two values a byte, the first in the low nibble (ONNX, "4-bit integer types") → one value an element."""
    nibbles = np.empty((raw.size, 2), np.uint8)
    np.bitwise_and(raw, 0x0F, out=nibbles[:, 0])
    np.right_shift(raw, 4, out=nibbles[:, 1])
    values = nibbles.reshape(-1)[: prod(shape)]
    if dtype == ml_dtypes.int4:  # signs
        values ^= 8
        values -= 8
    return values.view(dtype).reshape(shape)


def pack_four_bit(values: Array) -> Array:
    """One value an element, of a 4-bit type or one of 8 bits → two values a byte: uint8 [ceil(values / 2)]."""
    flat = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    packed = np.zeros((flat.size + 1) // 2, np.uint8)
    np.left_shift(flat[1::2], 4, out=packed[: flat.size // 2])
    packed |= flat[0::2] & 0x0F
    return packed


def stored_bytes(onnx_dtype: int, count: int) -> int:
    """Bytes that `count` values of an ONNX type take in a file (4-bit types: two values a byte)."""
    if onnx_dtype in FOUR_BIT:
        return (count + 1) // 2
    if onnx_dtype == onnx.TensorProto.STRING:
        return 0
    return count * numpy_dtype(onnx_dtype).itemsize


@cache
def numpy_dtype(onnx_dtype: int) -> np.dtype[Any]:
    """The NumPy (or ml_dtypes) type of an ONNX element type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_dtype))


def onnx_dtype(tensor: Tensor) -> int:
    """The ONNX element type of a tensor; `UNDEFINED` (0) where it is not known."""
    dtype = tensor.dtype
    if dtype is None:
        return onnx.TensorProto.UNDEFINED
    if isinstance(dtype, int):
        return dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def dtype_name(onnx_dtype: int) -> str:
    """'float32', 'bfloat16', 'int8' …: the name that reports and recipes use."""
    return numpy_dtype(onnx_dtype).name if onnx_dtype else "unknown"


def shape_of(tensor: Tensor) -> Shape | None:
    """Dimensions as integers, names or None for an unknown one; None where the rank itself is unknown."""
    return None if tensor.shape is None else tuple(tensor.shape)


def metadata(node: Node) -> dict[str, str]:
    """The node's metadata (exporters put the source module there); writable."""
    return node.metadata


def extra_attributes(node: Node) -> list[onnx.AttributeProto]:
    """Attributes of kinds that `attrs` cannot hold (types, sparse tensors, empty lists); kept as they came."""
    return node.extra_attributes


def module_of(node: Node) -> str:
    """The source module of a node ('encoder.layer.3.attention'), '' where the exporter left none.

    torch.onnx writes `pkg.torch.onnx.name_scopes`, a Python list of scopes from the model to the operator; its older
    exporter names the node '/encoder/layer.3/attention/MatMul_1'.
    """
    return module_in(node.name, metadata(node))


def module_in(name: str, metadata: Mapping[str, str]) -> str:
    """The source module that a node's name and metadata tell."""
    scopes = metadata.get("pkg.torch.onnx.name_scopes")
    if scopes is None:
        return ".".join(name.split("/")[1:-1]) if name.startswith("/") else ""
    names = [part.strip(" '\"[]") for part in scopes.split(",")]
    return next((name for name in reversed(names[:-1]) if name), "")
