"""The pass `convert-bf16`."""

from __future__ import annotations

from typing import ClassVar

from llmc.passes.precision.convert_half import ConvertHalf
from llmc.passes.precision.half import BFLOAT16


class ConvertBf16(ConvertHalf):
    """Computes in bfloat16: the range of float32, with 8 bits of precision; Casts where the old type has to stay.

    As `convert-fp16`, with bfloat16: `MatMul(x, W)` float32 or float16 → `MatMul(x, W)` bfloat16, W converted once.
    The graph is raised to opset 22 where an operator of it, such as Conv, has a bfloat16 form only there. Little
    overflows: numbers up to 3.39e38 fit, and those down to 1.18e-38. TensorRT takes it from SM80 on.

    The old type stays, with the reason in the report: operators without a bfloat16 form; sums along an axis,
    coordinates, angles of Sin and Cos and what becomes an integer, as far back as weights; subgraphs; what `keep`
    names; and nodes that rounding puts further off on the data than `loss` allows, such as differences of large
    numbers, with those before them that have to be exact for it. Numbers that stand for minus infinity in front of a
    softmax become -8.47e37.

    **Safety:** lossy: 8 bits of precision instead of 24 (or of the 11 of float16), a relative error of 2^-8 = 3.9e-3
    for each rounding.

    Source: ONNX specification, "BFloat16"; ONNX operator specifications; Kalamkar et al., A Study of BFLOAT16 for Deep
    Learning Training, 2019.
    """

    safety: ClassVar = "lossy"
    half: ClassVar = BFLOAT16
