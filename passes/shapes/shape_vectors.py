"""Makes the shape operands of Expand and Reshape for sizes that are known as dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmc.passes.graph import Graph, Tensor
from llmc.passes.shapes.dimension import Dimension
from llmc.passes.shapes.dimensions import Dimensions


def shape_vector(op: Any, graph: Graph, dims: Dimensions, sizes: Sequence[Dimension], near: Sequence[Tensor]) -> Any:
    """An int64 array, or the tensor that has these sizes: read off inputs of the graph where one has them, else `near`.

    Raises ValueError where a size that is no number stands nowhere.
    """
    parts: list[Any] = []
    for size in sizes:
        if size.number is None:
            tensor, axis = _where(size, dims, (*graph.inputs, *near))
            parts.append(op.Shape(tensor, start=axis, end=axis + 1))
        elif parts and isinstance(parts[-1], list):
            parts[-1].append(size.number)
        else:
            parts.append([size.number])
    joined = [np.asarray(part, dtype=np.int64) if isinstance(part, list) else part for part in parts]
    if len(joined) == 1:
        return joined[0]
    vector = op.Concat(*joined, axis=0)
    vector.dtype = np.dtype(np.int64)
    return vector


def _where(size: Dimension, dims: Dimensions, tensors: Sequence[Tensor]) -> tuple[Tensor, int]:
    for tensor in tensors:
        for axis, found in enumerate(dims.of(tensor) or ()):
            if found == size:
                return tensor, axis
    raise ValueError(f"no tensor at hand has the size {size}")
