"""The pass `fuse-clip`."""

from __future__ import annotations

from math import inf
from typing import Any, ClassVar

import numpy as np
import onnx

from llmc.passes.graph import Tensor, onnx_dtype
from llmc.passes.rewrite import Attribute, Rewrite, RewritePass, Scalar

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)


class _Clip(Rewrite):
    """What the rules share: opset 13, where Clip has every floating type, and an example of the bounds."""

    opset = 13

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        bounds = {"low": -0.5, "high": 0.75, "second_low": -0.25, "second_high": 1.0}
        return {name: bounds.get(name, shape) for name, shape in super().example(rng).items()}


def _problem(x: Tensor, *bounds: float | list[float] | None) -> str | None:
    """Why x is not clipped between these pairs of bounds, None for one that is missing."""
    if onnx_dtype(x) not in FLOATS:
        return f"'{x.name}' is not floating"
    for low, high in zip(bounds[::2], bounds[1::2], strict=True):
        if isinstance(low, list) or isinstance(high, list):
            return f"a bound is a list, {low} or {high}, where a number is needed"
        if inf in (low, high) or -inf in (low, high):
            return f"a bound of {low} and {high} is infinite, where Clip without one stops at the largest number"
        if not _least(low) <= _most(high):
            return f"the bounds {low} and {high} leave nothing between them"
    return None


def _least(low: Any) -> float:
    return -inf if low is None else float(low)


def _most(high: Any) -> float:
    return inf if high is None else float(high)


def _clip(op: Any, x: Any, low: float, high: float) -> Any:
    """Clip without the bounds that are infinite, which stand for one that is missing."""
    return op.Clip(x, None if low == -inf else low, None if high == inf else high)


class ClipFromMinMax(_Clip):
    """min(max(x, low), high)."""

    def pattern(self, op: Any, x: Any, low: Scalar, high: Scalar) -> Any:
        return op.Min(op.Max(x, low), high)

    def check(self, x: Any, low: Any, high: Any) -> str | None:
        return _problem(x, low, high)

    def replace(self, op: Any, x: Any, low: Any, high: Any) -> Any:
        return _clip(op, x, low, high)


class ClipFromMaxMin(ClipFromMinMax):
    """max(min(x, high), low)."""

    def pattern(self, op: Any, x: Any, low: Scalar, high: Scalar) -> Any:
        return op.Max(op.Min(x, high), low)


class ClipFromReluMin(_Clip):
    """min(relu(x), high)."""

    def pattern(self, op: Any, x: Any, high: Scalar) -> Any:
        return op.Min(op.Relu(x), high)

    def check(self, x: Any, high: Any) -> str | None:
        return _problem(x, 0.0, high)

    def replace(self, op: Any, x: Any, high: Any) -> Any:
        return _clip(op, x, 0.0, high)


class ReluFromMax(_Clip):
    """max(x, 0)."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Max(x, 0.0)

    def check(self, x: Any) -> str | None:
        return _problem(x, None, None)

    def replace(self, op: Any, x: Any) -> Any:
        return op.Relu(x)


class ClipOfRelu(_Clip):
    """clip(relu(x), low, high)."""

    def pattern(self, op: Any, x: Any, low: Attribute, high: Attribute) -> Any:
        return op.Clip(op.Relu(x), min=low, max=high)

    def check(self, x: Any, low: Any, high: Any) -> str | None:
        return _problem(x, low, high, 0.0, high)

    def replace(self, op: Any, x: Any, low: Any, high: Any) -> Any:
        return _clip(op, x, max(_least(low), 0.0), _most(high))


class ReluOfClip(_Clip):
    """relu(clip(x, low, high))."""

    def pattern(self, op: Any, x: Any, low: Attribute, high: Attribute) -> Any:
        return op.Relu(op.Clip(x, min=low, max=high))

    check = ClipOfRelu.check
    replace = ClipOfRelu.replace


class ClipOfClip(_Clip):
    """clip(clip(x, low, high), second_low, second_high)."""

    def pattern(
        self, op: Any, x: Any, low: Attribute, high: Attribute, second_low: Attribute, second_high: Attribute
    ) -> Any:
        return op.Clip(op.Clip(x, min=low, max=high), min=second_low, max=second_high)

    def check(self, x: Any, low: Any, high: Any, second_low: Any, second_high: Any) -> str | None:
        return _problem(x, low, high, second_low, second_high)

    def replace(self, op: Any, x: Any, low: Any, high: Any, second_low: Any, second_high: Any) -> Any:
        least, most = _least(second_low), _most(second_high)
        return _clip(op, x, *(min(max(bound, least), most) for bound in (_least(low), _most(high))))


class MinOfClip(_Clip):
    """min(clip(x, low, high), second_high)."""

    def pattern(self, op: Any, x: Any, low: Attribute, high: Attribute, second_high: Scalar) -> Any:
        return op.Min(op.Clip(x, min=low, max=high), second_high)

    def check(self, x: Any, low: Any, high: Any, second_high: Any) -> str | None:
        return _problem(x, low, high, None, second_high)

    def replace(self, op: Any, x: Any, low: Any, high: Any, second_high: Any) -> Any:
        return _clip(op, x, min(_least(low), second_high), min(_most(high), second_high))


class MaxOfClip(_Clip):
    """max(clip(x, low, high), second_low)."""

    def pattern(self, op: Any, x: Any, low: Attribute, high: Attribute, second_low: Scalar) -> Any:
        return op.Max(op.Clip(x, min=low, max=high), second_low)

    def check(self, x: Any, low: Any, high: Any, second_low: Any) -> str | None:
        return _problem(x, low, high, second_low, None)

    def replace(self, op: Any, x: Any, low: Any, high: Any, second_low: Any) -> Any:
        return _clip(op, x, max(_least(low), second_low), max(_most(high), second_low))


class ClipOfMin(_Clip):
    """clip(min(x, high), second_low, second_high)."""

    def pattern(self, op: Any, x: Any, high: Scalar, second_low: Attribute, second_high: Attribute) -> Any:
        return op.Clip(op.Min(x, high), min=second_low, max=second_high)

    def check(self, x: Any, high: Any, second_low: Any, second_high: Any) -> str | None:
        return _problem(x, None, high, second_low, second_high)

    def replace(self, op: Any, x: Any, high: Any, second_low: Any, second_high: Any) -> Any:
        least = _least(second_low)
        return _clip(op, x, least, max(min(high, _most(second_high)), least))


class ClipOfMax(_Clip):
    """clip(max(x, low), second_low, second_high)."""

    def pattern(self, op: Any, x: Any, low: Scalar, second_low: Attribute, second_high: Attribute) -> Any:
        return op.Clip(op.Max(x, low), min=second_low, max=second_high)

    def check(self, x: Any, low: Any, second_low: Any, second_high: Any) -> str | None:
        return _problem(x, low, None, second_low, second_high)

    def replace(self, op: Any, x: Any, low: Any, second_low: Any, second_high: Any) -> Any:
        most = _most(second_high)
        return _clip(op, x, min(max(low, _least(second_low)), most), most)


class ReluOfMin(_Clip):
    """relu(min(x, high))."""

    def pattern(self, op: Any, x: Any, high: Scalar) -> Any:
        return op.Relu(op.Min(x, high))

    check = ClipFromReluMin.check
    replace = ClipFromReluMin.replace


class ReluOfRelu(_Clip):
    """relu(relu(x))."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Relu(op.Relu(x))

    def check(self, x: Any) -> str | None:
        return _problem(x, None, None)

    def replace(self, op: Any, x: Any) -> Any:
        return op.Relu(x)


class FuseClip(RewritePass):
    """Fuses Min and Max with constants to Clip or Relu, and Min, Max, Clip and Relu that follow each other to one.

    x [any shape], floating; bounds constants of one element:
    `Min(Max(x, low), high)` → `Clip(x, low, high)`; `Max(x, 0)` → `Relu(x)`; `Clip(Relu(x), low, high)` →
    `Clip(x, max(low, 0), high)`; `Clip(Clip(x, a, b), c, d)` → one Clip, and so with Min, Max or Relu for either.
    Bounds that cross are left alone.

    **Safety:** exact.

    Source: ONNX operators Clip-13, Relu-14, Min-13, Max-13.
    """

    after: ClassVar = ("fold-constants", "fuse-swish")
    safety: ClassVar = "exact"
    repeat: ClassVar = True
    rules: ClassVar = (
        ClipFromMinMax(),
        ClipFromMaxMin(),
        ClipFromReluMin(),
        ReluFromMax(),
        ClipOfRelu(),
        ReluOfClip(),
        ClipOfClip(),
        MinOfClip(),
        MaxOfClip(),
        ClipOfMin(),
        ClipOfMax(),
        ReluOfMin(),
        ReluOfRelu(),
    )
