"""The pass `fuse-group-norm`."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar

import numpy as np

from llmc.passes.fuse.channel_weights import along_channels, values_of
from llmc.passes.graph import Shape, Tensor, numpy_dtype, onnx_dtype, shape_of
from llmc.passes.rewrite import Attribute, Rewrite, RewritePass, Scalar, Weight


class _GroupNorm(Rewrite):
    """What the rules share: shapes, and an affine part that may also have numbers for each group."""

    opset = 21

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        groups, channels = 2, 2 * int(rng.integers(1, 4))
        x = (2, channels, *(int(n) for n in rng.integers(3, 6, 2)))
        values = {
            "x": x,
            "grouped": np.array([0, groups, -1], np.int64),
            "shape": np.array([0, *x[1:]], np.int64),
            "epsilon": 1e-5,
            "group_scale": (groups,),
            "group_bias": (groups,),
            "scale": (channels, 1, 1),
            "bias": (channels, 1, 1),
        }
        return {p.name: values[p.name] for p in self.parameters}


class GroupNormAffine(_GroupNorm):
    """InstanceNormalization of [N, G, …], put back to [N, C, …], with a scale and bias for each channel."""

    def pattern(
        self, op: Any, x: Any, grouped: Weight, group_scale: Weight, group_bias: Weight, epsilon: Attribute,
        shape: Weight, scale: Weight, bias: Weight,
    ) -> Any:  # fmt: skip
        normalised = _normalised(op, x, grouped, group_scale, group_bias, epsilon, shape)
        return op.Add(op.Mul(normalised, scale), bias)

    def check(self, x: Any, grouped: Any, group_scale: Any, shape: Any, scale: Any, bias: Any) -> str | None:
        problem = _problem(x, grouped, group_scale, shape)
        if problem is not None:
            return problem
        for tensor in (scale, bias):
            if along_channels(tensor, len(x.shape), x.shape[1]) is None:
                return f"'{tensor.name}' has shape {list(tensor.shape)}: not one number for each channel"
        return None

    def replace(self, op: Any, x: Any, group_scale: Any, group_bias: Any, epsilon: Any, scale: Any, bias: Any) -> Any:
        factor, offset = (along_channels(tensor, len(x.shape), x.shape[1]) for tensor in (scale, bias))
        return _group_norm(op, x, group_scale, group_bias, epsilon, factor, offset)


class GroupNormPlain(_GroupNorm):
    """InstanceNormalization of [N, G, …], put back to [N, C, …]."""

    def pattern(
        self, op: Any, x: Any, grouped: Weight, group_scale: Weight, group_bias: Weight, epsilon: Attribute,
        shape: Weight,
    ) -> Any:  # fmt: skip
        return _normalised(op, x, grouped, group_scale, group_bias, epsilon, shape)

    def check(self, x: Any, grouped: Any, group_scale: Any, shape: Any) -> str | None:
        return _problem(x, grouped, group_scale, shape)

    def replace(self, op: Any, x: Any, group_scale: Any, group_bias: Any, epsilon: Any) -> Any:
        channels = x.shape[1]
        return _group_norm(op, x, group_scale, group_bias, epsilon, np.ones(channels), np.zeros(channels))


class GroupNormFromMoments(_GroupNorm):
    """The operator's own definition: mean and variance of [N, G, …], scale and bias on [N, C, …]."""

    symbolic = False

    def pattern(
        self, op: Any, x: Any, grouped: Weight, epsilon: Scalar, channelwise: Weight, scale: Weight, bias: Weight,
        shape: Weight,
    ) -> Any:  # fmt: skip
        groups = op.Reshape(x, grouped)
        mean = op.ReduceMean(groups, axes=[2])
        variance = op.Sub(op.ReduceMean(op.Mul(groups, groups), axes=[2]), op.Mul(mean, mean))
        normalised = op.Div(op.Sub(groups, mean), op.Sqrt(op.Add(variance, epsilon)))
        return op.Reshape(op.Add(op.Mul(op.Reshape(normalised, channelwise), scale), bias), shape)

    def check(self, x: Any, grouped: Any, channelwise: Any, scale: Any, bias: Any, shape: Any) -> str | None:
        sizes = shape_of(x)
        problem = _grouping_problem(x, grouped) or _restore_problem(x, shape)
        if problem is not None or sizes is None:
            return problem
        if len(grouped.shape) != 1 or grouped.shape[0] != 3:
            return f"'{grouped.name}' gives the groups more than one axis"
        between = _reshaped(sizes, values_of(channelwise).tolist())
        if between is None or len(between) != 3 or between[:2] != sizes[:2]:
            return f"'{channelwise.name}' does not give [N, C, …]"
        for tensor in (scale, bias):
            if along_channels(tensor, 3, int(sizes[1] or 0)) is None:
                return f"'{tensor.name}' has shape {list(tensor.shape)}: not one number for each channel"
        return None

    def replace(self, op: Any, x: Any, grouped: Any, epsilon: Any, scale: Any, bias: Any) -> Any:
        dtype = numpy_dtype(onnx_dtype(x))
        factor, offset = (along_channels(tensor, 3, x.shape[1]) for tensor in (scale, bias))
        groups = int(values_of(grouped)[1])
        assert factor is not None
        assert offset is not None
        return op.GroupNormalization(x, factor.astype(dtype), offset.astype(dtype), num_groups=groups, epsilon=epsilon)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        values = GroupNormAffine().example(rng)
        x = values["x"]
        affine = (1, x[1], 1)
        return values | {"channelwise": np.array([x[0], x[1], -1], np.int64), "scale": affine, "bias": affine}


def _normalised(op: Any, x: Any, grouped: Any, scale: Any, bias: Any, epsilon: Any, shape: Any) -> Any:
    normalised = op.InstanceNormalization(op.Reshape(x, grouped), scale, bias, epsilon=epsilon)
    return op.Reshape(normalised, op.either(op.Shape(x), shape))


def _group_norm(
    op: Any, x: Tensor, group_scale: Tensor, group_bias: Tensor, epsilon: float, factor: Any, offset: Any
) -> Any:
    """GroupNormalization whose scale and bias have those of the groups in them, computed in float64."""
    groups, dtype = group_scale.shape[0], numpy_dtype(onnx_dtype(x))
    scale, bias = (values_of(t).astype(np.float64).repeat(x.shape[1] // groups) for t in (group_scale, group_bias))
    scale, bias = (scale * factor).astype(dtype), (bias * factor + offset).astype(dtype)
    return op.GroupNormalization(x, scale, bias, num_groups=groups, epsilon=epsilon)


def _problem(x: Tensor, grouped: Tensor, group_scale: Tensor, shape: Tensor | None) -> str | None:
    problem = _grouping_problem(x, grouped)
    if problem is None and group_scale.shape[0] != values_of(grouped)[1]:
        return f"'{grouped.name}' has {values_of(grouped)[1]} groups, '{group_scale.name}' {group_scale.shape[0]}"
    return problem or (_restore_problem(x, shape) if shape is not None else None)


def _grouping_problem(x: Tensor, grouped: Tensor) -> str | None:
    """Why reshaping x [N, C, …] by this constant does not give [N, G, …] with whole groups of channels."""
    sizes, target = shape_of(x), values_of(grouped).tolist()
    if sizes is None or len(sizes) < 3 or not isinstance(sizes[1], int):
        return f"the channels of '{x.name}' are not known"
    if len(target) < 3 or target[1] <= 0 or sizes[1] % target[1]:
        return f"'{grouped.name}' is {target}: not whole groups of the {sizes[1]} channels"
    if target[0] in (0, sizes[0]):
        return None
    inner = sizes[1:]
    static = all(isinstance(n, int) for n in inner) and all(n > 0 for n in target[1:])
    if target[0] == -1 and static and prod(target[1:]) == prod(int(n or 0) for n in inner):
        return None
    return f"'{grouped.name}' is {target}: the first axis of '{x.name}', {list(sizes)}, must stay"


def _restore_problem(x: Tensor, shape: Tensor) -> str | None:
    """Why reshaping by this constant does not give the shape of x back."""
    sizes, target = shape_of(x) or (), values_of(shape).tolist()
    kept = [n == size or n == -1 or (n == 0 and i == 0) for i, (n, size) in enumerate(zip(target, sizes, strict=False))]
    if len(target) == len(sizes) and all(kept) and target.count(-1) <= 1:
        return None
    return f"'{shape.name}' is {target}: the shape of '{x.name}', {list(sizes)}, must come back"


def _reshaped(sizes: Shape, target: list[int]) -> Shape | None:
    """The static shape that Reshape makes of static `sizes`; None where one is not known."""
    if not all(isinstance(n, int) for n in sizes) or 0 in target:
        return None
    count = prod(int(n or 0) for n in sizes)
    rest = prod(n for n in target if n != -1)
    return tuple(count // rest if n == -1 else n for n in target)


class FuseGroupNorm(RewritePass):
    """Fuses group normalisation, spelled with InstanceNormalization between Reshapes, to GroupNormalization.

    x [N, C, …], G groups; scale and bias constants with one number for each channel:
    `Add(Mul(Reshape(InstanceNormalization(Reshape(x, [0, G, -1]), 1, 0), Shape(x)), scale), bias)` →
    `GroupNormalization(x, scale, bias, num_groups=G)`; also without scale and bias, with numbers for each group in
    the InstanceNormalization, and as ONNX's own function of the operator spells it with ReduceMean. C must be known.

    **Safety:** tolerance; the same function, rounded fewer times (float32: 1e-5 of the largest value).

    Source: ONNX operator GroupNormalization-21; Wu and He, Group Normalization, 2018.
    """

    after: ClassVar = ("fold-constants",)
    safety: ClassVar = "tolerance"
    rules: ClassVar = (GroupNormAffine(), GroupNormPlain(), GroupNormFromMoments())
