"""CodebookMatMul as a TensorRT plugin: shapes are of tensors without gaps, sizes may be symbolic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmc.kernels.codebook_matmul.kernel import KERNEL, plan

__all__ = ["KERNEL", "launch", "results"]

Shape = Sequence[Any]


def results(x: Shape, packed: Shape, *_codebook: Shape) -> tuple[Shape, ...]:
    """Shapes of the outputs."""
    return ((*x[:-1], packed[0]),)


def launch(x: Shape, packed: Shape, codebook: Shape, *, bits: int) -> tuple[Any, ...]:
    """What `plan` gives."""
    return plan(math.prod(x[:-1]), packed[0], x[-1], (x[-1], 1, packed[0]), codebook, bits)
