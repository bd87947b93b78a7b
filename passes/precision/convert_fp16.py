"""The pass `convert-fp16`."""

from __future__ import annotations

from typing import ClassVar

from llmc.passes.precision.convert_half import ConvertHalf
from llmc.passes.precision.half import FLOAT16


class ConvertFp16(ConvertHalf):
    """Computes in float16: weights and activations, with Casts in the graph where the old type has to stay.

    Every float32 tensor of any shape becomes float16 where all that touches it may: `MatMul(x, W)` float32 →
    `MatMul(x, W)` float16, W converted once. So does every bfloat16 one. One Cast, shared by all its readers, stands
    where a tensor goes from one type to the other, and none between neighbours of the same type. The scales of
    QuantizeLinear and DequantizeLinear become float16 with their tensors (at opset 19, to which the graph is raised
    where it has them), so that INT8 graphs get a float16 rest.

    The old type stays, with the reason in the report: tensors that come near 65504 on the data or stay under 2^-14, and
    constants beyond that or too small for float16 (an epsilon of 1e-12), with all that touches them; operators without
    a float16 form; sums along an axis, coordinates, angles of Sin and Cos and what becomes an integer, as far back as
    weights; subgraphs; what `keep` names; and nodes that rounding puts further off on the data than `loss` allows, such
    as differences of large numbers, with those before them that have to be exact for it. Numbers that stand for minus
    infinity in front of a softmax become -16376, to which scores can be added without overflow; bounds of Clip beyond
    float16 become its ends.

    **Safety:** lossy: 11 bits of precision instead of 24, a relative error of 2^-11 = 4.9e-4 for each rounding. What
    bfloat16 held, in 8 bits, is exact from 6.1e-5 to 65504.

    Source: IEEE 754 binary16; ONNX operator specifications; Micikevicius et al., Mixed Precision Training, 2018.
    """

    safety: ClassVar = "lossy"
    half: ClassVar = FLOAT16
