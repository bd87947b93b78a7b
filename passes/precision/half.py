"""What float16 and bfloat16 can hold, and which operators have a form in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx

from llmc.passes.graph import (
    DOMAIN,
    Array,
    Constant,
    Elementwise,
    Node,
    Tensor,
    blocks_of,
    constant_bytes,
    numpy_dtype,
    onnx_dtype,
    specs,
)
from llmc.passes.simplify.evaluate import RANDOM

FLOAT = onnx.TensorProto.FLOAT
_FLOATS = frozenset({FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})


@dataclass(frozen=True)
class Half:
    """A type of 16 bits that tensors of other float types become."""

    dtype: int
    """As ONNX numbers it."""
    largest: float
    smallest: float
    """The smallest normal number: below it, bits are lost."""
    whole: int
    """Whole numbers up to here are exact."""
    opset: int
    """From which all operators have it that ever will: graphs are raised to it where theirs lacks a form."""

    @property
    def name(self) -> str:
        """'float16' or 'bfloat16'."""
        return self.numpy.name

    @property
    def numpy(self) -> np.dtype[Any]:
        return numpy_dtype(self.dtype)

    @property
    def sources(self) -> frozenset[int]:
        """The types that become it, as ONNX numbers them: float32, and the other one of 16 bits."""
        return _FLOATS - {self.dtype}

    @property
    def fill(self) -> float:
        """Stands for minus infinity where scores are added to it: exp gives 0, and no sum of up to three masks with a
        score overflows to the infinity that would make a row of NaN."""
        return -self.largest / 4


FLOAT16 = Half(onnx.TensorProto.FLOAT16, largest=65504.0, smallest=2.0**-14, whole=2048, opset=19)
BFLOAT16 = Half(onnx.TensorProto.BFLOAT16, largest=3.3895313892515355e38, smallest=2.0**-126, whole=256, opset=22)
_LARGEST = {half.dtype: half.largest for half in (FLOAT16, BFLOAT16)}
COARSE = 2.0**-8
"""Relative error of a quantization scale that is too much: half a step of INT8 at the far end of its range."""
UNKNOWN = 2.0**-4
"""Relative error at which 16 bits say little about a number any more: fewer than four of its own are left."""
KEPT_FROM = 1 << 20
"""Bytes from which converted weights are computed again whenever they are read, instead of being held in memory."""

NEEDS_FLOAT32 = {
    "AffineGrid": "it computes coordinates, {half} holds those above {whole} to whole pixels only",
    "BitCast": "it reads the bits of float32",
    "CumProd": "it multiplies along a whole axis",
    "CumSum": "it counts along a whole axis, {half} stops counting at {whole}",
    "DFT": "it adds up a whole signal",
    "EyeLike": "its type is an attribute of it",
    "GridSample": "it reads coordinates, {half} holds those above {whole} to whole pixels only",
    "RoiAlign": "it reads coordinates, {half} holds those above {whole} to whole pixels only",
    "STFT": "it adds up a whole signal",
    **dict.fromkeys(RANDOM, "its type is an attribute of it"),
}
"""Operators that stay, though they have a form of 16 bits, and why."""
LEFT_INPUTS = {"Resize": {1, 2}, "Upsample": {1}}
"""Inputs that stay float32 beside converted data: scales and regions."""
ANY_TYPE = {"Cast": {0}, "CastLike": {0}, "Shape": {0}, "Size": {0}}
"""Inputs that may have another float type without changing anything else."""
FREE = {"Cast", "ConstantOfShape", "DequantizeLinear"}
"""Operators whose result may be made of 16 bits without any input that is; others of that kind name their type."""
SQUARES = {"InstanceNormalization", "LpNormalization", "MeanVarianceNormalization", "ReduceL2"}
"""Operators that square their first input on the way to a smaller result."""


@dataclass(frozen=True)
class Form:
    """Positions of the inputs and outputs of a node that have another float type and become `Half` with it."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def half_form(node: Node, opset: int, half: Half) -> Form | str | None:
    """The node's form in `half`, why it has none, or None where it has no tensor that matters to it of another float
    type."""
    domain = "" if node.domain in (None, "ai.onnx") else node.domain
    if not any(t.name and onnx_dtype(t) in half.sources for t in (*node.inputs, *node.outputs)):
        return None
    signature = _signature(node.op, domain, opset, half.name)
    if signature is None:
        return f"operators of domain '{domain}' are not known here" if domain else f"ONNX has no {node.op}-{opset}"
    since, formal_inputs, formal_outputs = signature
    loose = ANY_TYPE.get(node.op, set())
    left = LEFT_INPUTS.get(node.op, set()) | loose
    inputs = _positions(node.inputs, formal_inputs, half) - left
    outputs = _positions(node.outputs, formal_outputs, half)
    if not inputs and not outputs:
        matters = any(onnx_dtype(t) in half.sources and i not in loose for i, t in enumerate(node.inputs))
        gives = any(onnx_dtype(t) in half.sources for t in node.outputs)
        return f"{node.op}-{since} has no {half.name} form" if matters or gives else None
    if node.op in ("ScatterElements", "ScatterND") and node.attrs.get("reduction", "none") != "none":
        return "it adds up any number of values"
    unknown = next((t.name for t in (*node.inputs, *node.outputs) if t.name and not onnx_dtype(t)), None)
    if unknown is not None:
        return f"the type of '{unknown}' is not known"
    if not inputs and node.op not in FREE:
        return "its type is an attribute of it"
    return Form(frozenset(inputs), frozenset(outputs))


def _positions(tensors: list[Tensor], formal: tuple[bool, ...], half: Half) -> set[int]:
    """Where a tensor of another float type stands in a place that takes `half` too; the last formal one may repeat."""
    return {
        i
        for i, tensor in enumerate(tensors)
        if formal and tensor.name and onnx_dtype(tensor) in half.sources and formal[min(i, len(formal) - 1)]
    }


@cache
def _signature(op: str, domain: str, opset: int, half: str) -> tuple[int, tuple[bool, ...], tuple[bool, ...]] | None:
    """The version of the operator, and for each input and output whether it may be `half`; None if ONNX has none."""
    version = opset if not domain else onnx.defs.onnx_opset_version()
    if domain == DOMAIN and op in specs():
        schema = specs()[op].SCHEMA
    elif onnx.defs.has(op, version, domain):
        schema = onnx.defs.get_schema(op, version, domain)
    else:
        return None
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def takes(parameters: list[onnx.defs.OpSchema.FormalParameter]) -> tuple[bool, ...]:
        return tuple(f"tensor({half})" in allowed.get(p.type_str, [p.type_str]) for p in parameters)

    return schema.since_version, takes(list(schema.inputs)), takes(list(schema.outputs))


def misfit(constant: Constant, half: Half, *, scale: bool = False) -> str:
    """Why `half` cannot stand for the constant's values, '' where it can; `scale`s must be more exact."""
    if _reaches(constant, half):
        return ""
    largest = magnitude(constant)
    if largest > half.largest:
        return f"its constant '{constant.name}' reaches {largest:.4g}, {half.name} ends at {half.largest:.5g}"
    if _error(np.array([largest], np.float32), half) > UNKNOWN:
        return f"its constant '{constant.name}' is {largest:.4g}, too small for {half.name}"
    if scale and any(_error(values, half) > COARSE for values in map(_finite, _blocks(constant))):
        lowest = min(float(np.min(np.abs(values), initial=np.inf)) for values in map(_finite, _blocks(constant)))
        return f"its scale '{constant.name}' goes down to {lowest:.4g}, too coarse in {half.name}"
    return ""


def is_fill(constant: Constant, half: Half) -> bool:
    """Whether the constant holds numbers that stand for minus infinity, and none too large otherwise."""
    if _reaches(constant, half):
        return False
    lowest, highest = _range(constant)
    return lowest < -half.largest and highest <= half.largest


def lowest_finite(constant: Constant) -> float:
    """The least of the constant's values that is not infinite; 0 where there is none."""
    return float(min((np.min(_finite(values), initial=0.0) for values in _blocks(constant)), default=0.0))


def magnitude(constant: Constant) -> float:
    """The largest of the constant's absolute values that are finite; 0 where there is none."""
    lowest, highest = _range(constant)
    if np.isfinite(lowest) and np.isfinite(highest):
        return max(highest, -lowest)
    return max(float(np.max(np.abs(_finite(values)), initial=0.0)) for values in _blocks(constant))


def as_half(constant: Constant, name: str, half: Half, floor: float) -> Constant:
    """The constant in `half`, finite values below `floor` or above the largest brought there; infinities stay."""
    fits = _LARGEST.get(onnx_dtype(constant), np.inf) <= min(half.largest, -floor)

    def change(values: Array) -> Array:
        with np.errstate(invalid="ignore"):  # of NaN, which stays that
            if fits:
                return values.astype(half.numpy)
            values = values.astype(np.float32, copy=False)
            if values.size and not (floor <= np.min(values) and np.max(values) <= half.largest):
                values = np.where(np.isinf(values), values, np.clip(values, floor, half.largest))
            return np.asarray(values).astype(half.numpy)

    changed = Elementwise(half.dtype, constant._values, change)
    return Constant(name, changed.load() if constant_bytes(constant) < KEPT_FROM else changed)


def _reaches(constant: Constant, half: Half) -> bool:
    """Whether `half` goes as far as the constant's type does, to either side: float16's numbers as bfloat16 lose bits
    (2^-9 of them at most), and no more."""
    return _LARGEST.get(onnx_dtype(constant), np.inf) <= half.largest


def _blocks(constant: Constant) -> Iterator[Array]:
    """The values as float32, block by block."""
    return (block.astype(np.float32, copy=False) for block in blocks_of(constant._values))


def _range(constant: Constant) -> tuple[float, float]:
    """The least and the largest value, NaN where there is one; zeros where there is no value."""
    ends = [(np.min(values), np.max(values)) for values in _blocks(constant) if values.size]
    return (float(np.min([low for low, _ in ends])), float(np.max([high for _, high in ends]))) if ends else (0.0, 0.0)


def _finite(values: Array) -> Array:
    finite = np.isfinite(values)
    return values if finite.all() else values[finite]


def _error(values: Array, half: Half) -> float:
    """The largest relative error of the values in `half`; zeros have none."""
    values = values[values != 0]
    return float(np.max(np.abs(values.astype(half.numpy).astype(np.float32) / values - 1), initial=0.0))
