"""SwiGLUQuantize as a TensorRT plugin: shapes are of tensors without gaps, sizes may be symbolic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmc.kernels.swiglu_quantize.kernel import KERNEL, plan

__all__ = ["KERNEL", "launch", "results"]

Shape = Sequence[Any]


def results(gate: Shape, *_others: Shape) -> tuple[Shape, ...]:
    """Shapes of the outputs."""
    return (gate,)


def launch(gate: Shape, *_others: Shape) -> tuple[Any, ...]:
    """What `plan` gives."""
    return plan(math.prod(gate[:-1]), gate[-1], gate[-1], gate[-1])
