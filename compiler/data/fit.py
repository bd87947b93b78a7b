"""Whether arrays are what a graph's inputs take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llmc.compiler.errors import LlmcError
from llmc.passes.graph import Array, Tensor, shape_of


def fit(arrays: Mapping[str, Array], inputs: Sequence[Tensor], origin: object) -> dict[str, Array]:
    """The arrays of one sample in the inputs' dtypes, once dtypes and shapes are found to fit.

    `origin` begins messages: the file, say. Raises LlmcError for what does not fit, or is cast only with loss.
    """
    missing = [tensor.name for tensor in inputs if tensor.name not in arrays]
    if missing:
        raise LlmcError(f"{origin} has no array '{missing[0]}' for that input; it has: {', '.join(arrays)}")
    sizes: dict[str, tuple[str, int]] = {}
    return {tensor.name: _fit(arrays[tensor.name], tensor, f"{origin}", sizes) for tensor in inputs}


def _fit(array: Array, tensor: Tensor, origin: str, sizes: dict[str, tuple[str, int]]) -> Array:
    """`sizes` are those of symbolic dimensions so far: name → (input, size)."""
    where = f"{origin}: array '{tensor.name}'"
    if tensor.dtype is not None and not np.can_cast(array.dtype, tensor.dtype, "safe"):
        raise LlmcError(f"{where} is {array.dtype}, the model takes {np.dtype(tensor.dtype)}; make it that")
    shape = shape_of(tensor)
    if shape is not None:
        if array.ndim != len(shape):
            raise LlmcError(f"{where} has shape {array.shape}, the model takes {len(shape)} dimensions {text(shape)}")
        for axis, (size, wanted) in enumerate(zip(array.shape, shape, strict=True)):
            if isinstance(wanted, int) and size != wanted:
                raise LlmcError(f"{where} has shape {array.shape}, but axis {axis} must be {wanted} in {text(shape)}")
            if isinstance(wanted, str):
                other, known = sizes.setdefault(wanted, (tensor.name, size))
                if known != size:
                    raise LlmcError(f"{where}: '{wanted}' is {size}, but {known} in array '{other}'")
    return array if tensor.dtype is None else array.astype(tensor.dtype, copy=False)


def text(shape: Sequence[int | str | None]) -> str:
    """A shape as messages show it: '[batch, 3, ?]'."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
