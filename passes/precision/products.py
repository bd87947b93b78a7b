"""What quantized arithmetic takes: products, their activations, and their weights however they come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from llmc.passes.graph import Array, Constant, Node, Tensor, constant_value, numpy_dtype, rows_of

SINCE = {np.dtype(np.float32): 13, np.dtype(np.float16): 19}
"""Type that can be quantized → the opset from which QuantizeLinear takes it, with an axis."""


Reader = Callable[[slice], Array]
"""Reads rows of a constant, when they are needed."""
WHOLE = slice(None)


@dataclass(frozen=True)
class Product:
    """A node to quantize: its activations, and its weight, if it has one, with the axis of its output channels."""

    node: Node
    dtype: np.dtype[np.floating]
    activations: tuple[Tensor, ...]
    weight: Tensor | None = None
    read: Reader | None = None
    axis: int = 0
    position: int = 1
    """Of the weight among the inputs."""

    @property
    def names(self) -> list[str]:
        """Of the activations, each once."""
        return list(dict.fromkeys(tensor.name for tensor in self.activations))

    @property
    def channels(self) -> int | None:
        """The axis of the result that a bias [channels] would run along; None where there is none."""
        if self.weight is None:
            return None
        if self.node.op.startswith("Conv"):
            return 1
        return -1 if self.position == 1 else None

    def describe(self, amax: Mapping[str, float]) -> str:
        clips = ", ".join(f"'{name}' clips at {amax[name]:.4g}" for name in self.names)
        return clips if self.weight is None else f"{clips}; '{self.weight.name}' per channel on axis {self.axis}"


def as_product(node: Node, attention: bool) -> Product | str:
    """How `node` is quantized, or why not."""
    factors = node.inputs[:2]
    if any(_producer(tensor, {"DequantizeLinear"}) for tensor in factors):
        return "quantized already"
    readers = [_reader(tensor) for tensor in factors]
    if all(readers):
        return "both its factors are constant: fold-constants makes it one"
    position = next((i for i, read in enumerate(readers) if read is not None), None)
    if position is None:
        return _activation_product(node, attention)
    if position == 0 and node.op.startswith("Conv"):
        return "its weight is not constant"
    read = cast("Reader", readers[position])
    weight = read(slice(0, 1))
    if weight.dtype not in SINCE:
        return f"its weight is {weight.dtype}; only float32 and float16 are quantized"
    if weight.ndim < 2:
        return "its weight is a vector: to quantize it gains nothing"
    axis = _channel_axis(node, position, weight.ndim)
    return Product(node, weight.dtype, (factors[1 - position],), factors[position], read, axis, position)


def _activation_product(node: Node, attention: bool) -> Product | str:
    if node.op.startswith("Conv"):
        return "its weight is not constant"
    if not attention:
        return "it multiplies two activations ('attention: true' quantizes those)"
    first, second = node.inputs[:2]
    dtype = first.dtype or second.dtype
    if dtype not in SINCE:
        return f"its factors are {dtype or 'of unknown type'}; only float32 and float16 are quantized"
    return Product(node, dtype, (first, second))


def _channel_axis(node: Node, position: int, rank: int) -> int:
    """The axis of the weight, at input `position`, along which output channels run (in a group, for ConvTranspose)."""
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1
    transposed = bool(node.attrs.get("transB" if position else "transA", 0))
    return rank - 1 if (position == 1) != transposed else rank - 2


def _reader(tensor: Tensor) -> Reader | None:
    """Reads a constant, or what Transpose, Reshape, Cast and Identity make of one; None for any other tensor.

    It reads what stands there now, whatever later passes do to the tensors on the way.
    """
    if isinstance(tensor, Constant):
        return partial(rows_of, tensor._values)
    node = _producer(tensor, {"Transpose", "Reshape", "Cast", "Identity"})
    inner = _reader(node.inputs[0]) if node is not None else None
    if node is None or inner is None:
        return None
    if node.op == "Transpose":
        order = node.attrs.get("perm")
        return lambda rows: inner(WHOLE).transpose(order)[rows]
    if node.op == "Cast":
        dtype = numpy_dtype(node.attrs["to"])
        return lambda rows: inner(rows).astype(dtype)
    if node.op == "Identity":
        return inner
    wanted = constant_value(node.inputs[1])
    if wanted is None:
        return None
    old, zero_is_old = inner(WHOLE).shape, not node.attrs.get("allowzero", 0)
    shape = [old[i] if size == 0 and zero_is_old else int(size) for i, size in enumerate(wanted)]
    return lambda rows: inner(WHOLE).reshape(shape)[rows]


def _producer(tensor: Tensor, ops: Collection[str]) -> Node | None:
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and is_operator(node, ops) else None


def is_operator(node: Node, ops: Collection[str]) -> bool:
    return node.op in ops and node.domain in (None, "", "ai.onnx")
