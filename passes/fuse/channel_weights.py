"""A factor and an offset for each output channel, taken into the constant weights and bias of the product before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from llmc.passes.graph import (
    Array,
    Constant,
    Rowwise,
    Tensor,
    constant_value,
    load_values,
    numpy_dtype,
    onnx_dtype,
    rows_of,
)
from llmc.passes.graph.in_parts import row_slices

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True)
class Product:
    """A Conv, ConvTranspose, Gemm or MatMul whose weights, and bias if it has one, are constants."""

    op: str
    weight: Tensor
    bias: Tensor | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def channel_axis(self) -> int:
        """The axis of the weights that has the output channels (those of one group, for ConvTranspose)."""
        if self.op == "Gemm":
            return 0 if self.attributes.get("transB") else 1
        return 0 if self.op == "Conv" else 1

    @property
    def channels(self) -> int:
        count = int(self.weight.shape[self.channel_axis])
        return count * int(self.attributes.get("group", 1)) if self.op == "ConvTranspose" else count

    def along_channels(self, constant: Tensor) -> Array | None:
        """A constant that meets the product's result, as float64 [channels]; None where it varies along other axes."""
        return along_channels(constant, len(self.weight.shape), self.channels)

    def bias_values(self) -> Array | None:
        """The bias as float64 [channels], a Gemm's `beta` applied; None where it varies along other axes."""
        if self.bias is None:
            return np.zeros(self.channels)
        if self.op != "Gemm":
            return values_of(self.bias).astype(np.float64)
        bias = along_channels(self.bias, 2, self.channels)
        return None if bias is None else bias * float(self.attributes.get("beta", 1.0))

    def problem(self, factor: Array | None, offset: Array | None) -> str | None:
        """Why the weights and bias cannot take these in; both float64 [channels]."""
        if onnx_dtype(self.weight) not in FLOATS:
            return f"'{self.weight.name}' is not floating"
        if factor is None or offset is None:
            return f"what meets {self.op} is not one number for each of its {self.channels} channels"
        bias = self.bias_values()
        if bias is None:
            return f"the bias '{self.bias.name if self.bias else ''}' is not one number for each channel"
        largest = float(ml_dtypes.finfo(self.weight.dtype).max)  # type: ignore[no-untyped-call]
        with np.errstate(over="ignore", invalid="ignore"):
            shifted = np.abs(bias * factor + offset)
            if not np.isfinite(factor).all() or not (shifted <= largest).all():
                return f"the bias would leave the range of {numpy_dtype(onnx_dtype(self.weight)).name}"
            if largest < 1e30 and not all((np.abs(part) <= largest).all() for part in self._scaled_parts(factor)):
                return f"'{self.weight.name}' would leave the range of {numpy_dtype(onnx_dtype(self.weight)).name}"
        return None

    def scaled(self, factor: Array) -> Tensor | Rowwise:
        """The weights times the factor of their channel, computed in float64 whenever they are asked for."""
        if (factor == 1).all():
            return self.weight
        dtype, by, read = numpy_dtype(onnx_dtype(self.weight)), self._along_weight(factor), self._rows
        return Rowwise(
            onnx_dtype(self.weight), by.shape, lambda rows: (read(rows).astype(np.float64) * by[rows]).astype(dtype)
        )

    def shifted(self, factor: Array, offset: Array) -> Array:
        """The bias times the factor, plus the offset."""
        bias = self.bias_values()
        assert bias is not None
        return (bias * factor + offset).astype(numpy_dtype(onnx_dtype(self.weight)))

    @cached_property
    def _rows(self) -> Callable[[slice], Array]:
        """Reads rows of the weights as they are now, seen through Cast and Identity."""
        held = self.weight._values if isinstance(self.weight, Constant) else values_of(self.weight)
        return partial(rows_of, held)

    def _along_weight(self, factor: Array) -> Array:
        """The factors where each meets its channel's weights, of the weights' shape."""
        shape = tuple(map(int, self.weight.shape))
        others = [1] * len(shape)
        if self.op != "ConvTranspose":
            others[self.channel_axis] = self.channels
            return np.broadcast_to(factor.reshape(others), shape)
        group = int(self.attributes.get("group", 1))
        grouped = factor.reshape(group, -1).repeat(shape[0] // group, axis=0)
        return np.broadcast_to(grouped.reshape(*grouped.shape, *others[2:]), shape)

    def _scaled_parts(self, factor: Array) -> Iterator[Array]:
        """The scaled weights in float64, some rows at a time."""
        by = self._along_weight(factor)
        return (self._rows(rows).astype(np.float64) * by[rows] for rows in row_slices(by.shape))


def along_channels(constant: Tensor, rank: int, channels: int) -> Array | None:
    """A constant that broadcasts over axis 1 of a tensor of `rank` axes, as float64 [channels]; None for any other."""
    shape = (1,) * (rank - len(constant.shape)) + tuple(constant.shape)
    if len(shape) != rank or shape[1] not in (1, channels) or prod(shape) != shape[1]:
        return None
    return np.broadcast_to(values_of(constant).astype(np.float64).reshape(-1), (channels,))


def values_of(constant: Tensor) -> Array:
    """The values of a constant, seen through Cast and Identity, and not kept in memory where it holds them itself."""
    values = load_values(constant) if isinstance(constant, Constant) else constant_value(constant)
    assert values is not None
    return values
