"""DequantGemv as a TensorRT plugin: shapes are of tensors without gaps, sizes may be symbolic.

TensorRT hands plugins no 4-bit tensors: the weight comes as int8 [N, K / 2], two values a byte, the first in the low
nibble, which is how ONNX stores them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmc.kernels.dequant_gemv.kernel import KERNEL, plan

__all__ = ["KERNEL", "launch", "results"]

Shape = Sequence[Any]


def results(x: Shape, weight: Shape, *_scale: Shape) -> tuple[Shape, ...]:
    """Shapes of the outputs."""
    return ((*x[:-1], weight[0]),)


def launch(x: Shape, weight: Shape, _scale: Shape, *, block: int) -> tuple[Any, ...]:
    """What `plan` gives."""
    return plan(math.prod(x[:-1]), weight[0], x[-1], x[-1], weight[0], block)
