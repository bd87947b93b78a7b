"""Random ONNX models: what exporters write, and what they should not, in random order."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

BATCH = 3
SIZES = (1, 2, 4)
DTYPES = {"float32": 1, "float16": 10, "int64": 7, "bool": 9}
LARGEST = 50.0
"""Magnitude that no value exceeds: float16 stays far from overflow, and exponentials stay harmless."""
NUMBERS = (0.0, 1.0, -1.0, 2.0, 0.5, 3.0, math.sqrt(2), math.sqrt(0.5), 1.702, 0.044715, 0.125)


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: `exact` ones are moved inputs and integers, which no rewrite may round."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float
    exact: bool = False

    @property
    def bound(self) -> float:
        return max(abs(self.low), abs(self.high))

    @property
    def floating(self) -> bool:
        return self.dtype.startswith("float")


class Maker:
    """Makes nodes over the tensors that are there; every choice is one of `rng`."""

    def __init__(self, rng: random.Random, opset: int, outer: Maker | None = None) -> None:
        self.rng, self.opset, self.outer = rng, opset, outer
        self.names: list[int] = outer.names if outer else []
        self.initializers: list[onnx.TensorProto] = outer.initializers if outer else []
        self.nodes: list[onnx.NodeProto] = []
        self.values: list[Value] = list(outer.values) if outer else []

    def fresh(self) -> str:
        self.names.append(0)
        return f"t{len(self.names)}"

    def constant(self, array: Any, dtype: str) -> str:
        name = self.fresh()
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(array, dtype=dtype), name))
        return name

    def ints(self, values: Sequence[int]) -> str:
        return self.constant(values, "int64")

    def node(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> list[str]:
        made = [self.fresh() for _ in range(outputs)]
        name = self.rng.choice(["", f"n{made[0]}"])
        self.nodes.append(helper.make_node(op, list(inputs), made, name=name, **attributes))
        return made

    def add(
        self, op: str, inputs: Sequence[str], like: Value, *, shape: Sequence[int] | None = None, **more: Any
    ) -> Value:
        """One node with one output; what is not said of the output is as it is of `like`."""
        known = {k: more.pop(k) for k in ("dtype", "low", "high", "exact") if k in more}
        (name,) = self.node(op, inputs, **more)
        value = Value(
            name,
            known.get("dtype", like.dtype),
            tuple(like.shape if shape is None else (int(n) for n in shape)),
            known.get("low", like.low),
            known.get("high", like.high),
            known.get("exact", False),
        )
        self.values.append(value)
        return value

    def pick(self, wanted: Callable[[Value], bool] = lambda _: True) -> Value | None:
        """A tensor, the younger the likelier."""
        fitting = [value for value in self.values if wanted(value)]
        if not fitting:
            return None
        return fitting[max(self.rng.randrange(len(fitting)), self.rng.randrange(len(fitting)))]

    def floating(self, bound: float = LARGEST, rank: int = 0) -> Value | None:
        return self.pick(lambda v: v.floating and v.bound <= bound and len(v.shape) >= rank)

    def on_axes(
        self, op: str, value: Value, axes: Sequence[int], since: int, shape: Sequence[int], **more: Any
    ) -> Value:
        if self.opset < since:
            return self.add(op, [value.name], value, shape=shape, axes=list(axes), **more)
        return self.add(op, [value.name, self.ints(axes)], value, shape=shape, **more)

    def number(self, value: Value) -> tuple[str, float, tuple[int, ...]]:
        """A constant of a favourite number, in a shape that goes with the tensor's; what they broadcast to."""
        number, rank = self.rng.choice(NUMBERS), len(value.shape)
        shapes = [(), (1,), value.shape[-1:], (1,) * rank, value.shape, (2, *(1,) * rank), (*value.shape[:-1], 4)]
        shape = self.rng.choice([s for s in shapes if _broadcast(value.shape, s) is not None and len(s) < 6])
        broadcast = _broadcast(value.shape, shape)
        return self.constant(np.full(shape, number), value.dtype), number, broadcast or ()


# Steps: each makes a few nodes, or none where no tensor fits

SMOOTH = {
    "Tanh": (math.tanh, 1.0),
    "Sigmoid": (lambda x: 1 / (1 + math.exp(-x)), 1.0),
    "Erf": (math.erf, 1.0),
    "Softplus": (lambda x: math.log1p(math.exp(x)), 1.0),
    "Exp": (math.exp, 3.0),
    "Elu": (lambda x: x if x > 0 else math.exp(x) - 1, 1.0),
    "Relu": (lambda x: max(x, 0.0), 1.0),
    "LeakyRelu": (lambda x: x if x > 0 else 0.01 * x, 1.0),
    "HardSigmoid": (lambda x: min(max(0.2 * x + 0.5, 0.0), 1.0), 1.0),
    "Identity": (lambda x: x, 1.0),
}
EXACT = {"Relu", "Identity"}


def unary(m: Maker) -> None:
    op = m.rng.choice(sorted(SMOOTH))
    function, _ = SMOOTH[op]
    x = m.floating(3.0 if op == "Exp" else LARGEST)
    if x:
        exact = x.exact and op in EXACT
        m.add(op, [x.name], x, low=function(x.low), high=function(x.high), exact=exact)


def mirrored(m: Maker) -> None:
    x = m.floating()
    if x:
        op = m.rng.choice(["Neg", "Abs"])
        low, high = (-x.high, -x.low) if op == "Neg" else (0.0, x.bound)
        y = m.add(op, [x.name], x, low=low, high=high, exact=x.exact)
        if m.rng.random() < 0.4:
            m.add(
                op,
                [y.name],
                y,
                low=x.low if op == "Neg" else 0.0,
                high=x.high if op == "Neg" else x.bound,
                exact=x.exact,
            )


def jumping(m: Maker) -> None:
    x = m.pick(lambda v: v.floating and v.exact)
    if x:
        m.add(
            m.rng.choice(["Floor", "Ceil", "Round", "Sign"]),
            [x.name],
            x,
            low=min(x.low, -1) - 1,
            high=max(x.high, 1) + 1,
        )


def positive(m: Maker) -> None:
    x = m.pick(lambda v: v.floating and v.low >= 0.05 and v.bound <= LARGEST)
    if not x:
        x = m.floating(6.0)
        if not x:
            return
        squared = m.add("Mul", [x.name, x.name], x, low=0.0, high=x.bound**2)
        x = m.add("Add", [squared.name, m.constant(0.5, x.dtype)], x, low=0.5, high=x.bound**2 + 0.5)
    op = m.rng.choice(["Sqrt", "Log", "Reciprocal", "Div"])
    if op == "Div":
        m.add("Div", [m.constant(1.0, x.dtype), x.name], x, low=1 / x.high, high=1 / x.low)
        return
    function = {"Sqrt": math.sqrt, "Log": math.log, "Reciprocal": lambda v: 1 / v}[op]
    low, high = sorted((function(x.low), function(x.high)))
    m.add(op, [x.name], x, low=low, high=high)


def with_number(m: Maker) -> None:
    """A chain of one to three constants."""
    for _ in range(m.rng.choice([1, 1, 2, 3])):
        x = m.floating()
        if not x:
            return
        op = m.rng.choice(["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"])
        constant, number, shape = m.number(x)
        inputs = [x.name, constant]
        if op == "Pow":
            if x.bound > 3 or number not in (1.0, 2.0, 3.0):
                continue
            m.add(op, inputs, x, shape=shape, low=-(x.bound**number), high=x.bound**number)
            continue
        if op == "Div" and abs(number) < 0.1:
            continue
        if op in ("Add", "Mul", "Max", "Min") and m.rng.random() < 0.5:
            inputs.reverse()
        ends = {
            "Add": [x.low + number, x.high + number],
            "Sub": [x.low - number, x.high - number],
            "Mul": [x.low * number, x.high * number],
            "Div": [x.low / (number or 1.0), x.high / (number or 1.0)],
            "Max": [max(x.low, number), max(x.high, number)],
            "Min": [min(x.low, number), min(x.high, number)],
        }[op]
        if max(map(abs, ends)) <= LARGEST:
            m.add(op, inputs, x, shape=shape, low=min(ends), high=max(ends))


def pairwise(m: Maker) -> None:
    x = m.floating()
    y = x and m.pick(lambda v: v.dtype == x.dtype and _broadcast(x.shape, v.shape) is not None and v.bound <= LARGEST)
    if not x or not y:
        return
    op = m.rng.choice(["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean"])
    bound = {"Mul": x.bound * y.bound, "Div": x.bound / y.low if y.low >= 0.05 else math.inf}.get(op, x.bound + y.bound)
    if bound <= LARGEST:
        m.add(op, [x.name, y.name], x, shape=_broadcast(x.shape, y.shape), low=-bound, high=bound)


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(a, b)
    except ValueError:
        return None


def clipped(m: Maker) -> None:
    x = m.floating()
    if not x:
        return
    if x.exact is False and m.rng.random() < 0.2:
        m.add("Dropout", [x.name], x)
        return
    ends = [m.rng.choice(["", m.constant(n, x.dtype)]) for n in (-1.0, 6.0)]
    low = min(max(x.low, -1.0) if ends[0] else x.low, 6.0 if ends[1] else math.inf)
    while ends and not ends[-1]:
        ends.pop()
    high = max(min(x.high, 6.0) if len(ends) == 2 else x.high, low)
    m.add("Clip", [x.name, *ends], x, low=low, high=high, exact=x.exact)


def cast(m: Maker) -> None:
    """One to three Casts, one after another."""
    x = None if m.outer else m.pick()
    for _ in range(m.rng.choice([1, 2, 2, 3])):
        to = m.rng.choice(list(DTYPES))
        if not x or (to in ("int64", "bool") and not x.exact):
            return
        exact = x.exact and (to != "float16" or x.dtype in ("bool", "float16"))
        low, high = (0.0, 1.0) if to == "bool" else (x.low, x.high)
        x = m.add("Cast", [x.name], x, dtype=to, to=DTYPES[to], low=low, high=high, exact=exact)


def compared(m: Maker) -> None:
    x = m.pick(lambda v: v.floating and v.exact)
    if x:
        op, (threshold, _, shape) = m.rng.choice(["Greater", "Less", "LessOrEqual", "Equal"]), m.number(x)
        m.add(op, [x.name, threshold], x, shape=shape, dtype="bool", low=0.0, high=1.0, exact=True)


def logical(m: Maker) -> None:
    x = m.pick(lambda v: v.dtype == "bool")
    if x:
        op = m.rng.choice(["And", "Or", "Xor", "Not"])
        other = [] if op == "Not" else [m.constant(m.rng.random() < 0.5, "bool")]
        m.add(op, [x.name, *other], x, exact=True)


def where(m: Maker) -> None:
    condition, x = m.pick(lambda v: v.dtype == "bool"), m.floating()
    if not x:
        return
    if condition is None or m.rng.random() < 0.3:
        condition = Value(m.constant(m.rng.random() < 0.5, "bool"), "bool", (), 0, 1)
    other, number, wide = m.number(x)
    shape = _broadcast(condition.shape, wide)
    if shape is None:
        return
    inputs = [x.name, other] if m.rng.random() < 0.5 else [other, x.name]
    m.add("Where", [condition.name, *inputs], x, shape=shape, low=min(x.low, number), high=max(x.high, number))


def transposed(m: Maker) -> None:
    x = m.pick(lambda v: len(v.shape) >= 1)
    for _ in range(m.rng.choice([1, 2, 2, 3])):
        if x:
            order = m.rng.sample(range(len(x.shape)), len(x.shape))
            attributes = {"perm": order}
            if m.rng.random() < 0.2:
                order, attributes = order[::-1] if order == sorted(order) else sorted(order)[::-1], {}
            x = m.add("Transpose", [x.name], x, shape=[x.shape[i] for i in order], exact=x.exact, **attributes)
            if m.rng.random() < 0.2 and x.floating:
                x = m.add("Relu", [x.name], x, low=max(x.low, 0), high=max(x.high, 0), exact=x.exact)


def reshaped(m: Maker) -> None:
    x = m.pick()
    for _ in range(m.rng.choice([1, 2, 2, 3])):
        if x:
            x = reshape(m, x)


def reshape(m: Maker, x: Value) -> Value:
    op, rank = m.rng.choice(["Reshape", "Reshape", "Flatten", "Squeeze", "Unsqueeze"]), len(x.shape)
    if op == "Flatten":
        axis = m.rng.randint(-rank, rank) if rank else 0
        split = axis % rank if axis < 0 else axis
        shape = (math.prod(x.shape[:split]), math.prod(x.shape[split:]))
        return m.add(op, [x.name], x, shape=shape, axis=axis, exact=x.exact)
    ones = [axis for axis, size in enumerate(x.shape) if size == 1]
    if op == "Squeeze" and ones:
        axes = m.rng.sample(ones, m.rng.randint(1, len(ones)))
        shape = [size for axis, size in enumerate(x.shape) if axis not in axes]
        return m.on_axes(op, x, [axis - m.rng.choice([0, rank]) for axis in axes], 13, shape, exact=x.exact)
    if op == "Unsqueeze" and rank < 5:
        axis = m.rng.randint(-rank - 1, rank)
        return m.on_axes(op, x, [axis], 13, np.expand_dims(np.empty(x.shape), axis).shape, exact=x.exact)
    target = m.rng.choice([list(x.shape), [x.shape[0], -1] if rank else [1], [-1], _split(m, x.shape), [*x.shape, 1]])
    if -1 not in target and target and m.rng.random() < 0.6:
        target[m.rng.randrange(len(target))] = -1
    shape = np.empty(x.shape).reshape(target).shape
    for axis in range(min(rank, len(target))):
        if shape[axis] == x.shape[axis] and m.rng.random() < 0.4:
            target[axis] = 0
    return m.add("Reshape", [x.name, m.ints(target)], x, shape=shape, exact=x.exact)


def _split(m: Maker, shape: tuple[int, ...]) -> list[int]:
    """One dimension as two, or two as one."""
    axis = m.rng.randrange(len(shape)) if shape else 0
    if shape and shape[axis] % 2 == 0 and len(shape) < 5:
        return [*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :]]
    return [*shape[:axis], math.prod(shape[axis : axis + 2]), *shape[axis + 2 :]]


def shape_arithmetic(m: Maker) -> None:
    """Shape → Gather → Unsqueeze → Concat → Reshape or Expand, as exporters write it."""
    x = m.pick(lambda v: 2 <= len(v.shape) < 5)
    if not x:
        return
    source = m.pick(lambda v: len(v.shape) >= 1 and v.shape[0] == x.shape[0]) or x
    (shape,) = m.node("Shape", [source.name])
    (first,) = m.node("Gather", [shape, m.constant(0, "int64")])
    if m.rng.random() < 0.3:
        (first,) = m.node("Cast", [first], to=7)
    if m.opset < 13:
        (first,) = m.node("Unsqueeze", [first], axes=[0])
    else:
        (first,) = m.node("Unsqueeze", [first, m.ints([0])])
    rest = m.rng.choice([list(x.shape[1:]), [-1], [*x.shape[1:-1], -1]])
    (target,) = m.node("Concat", [first, m.ints(rest)], axis=0)
    if -1 not in rest and m.rng.random() < 0.4:
        m.add("Expand", [x.name, target], x, exact=x.exact)
    else:
        m.add("Reshape", [x.name, target], x, shape=np.empty(x.shape).reshape([x.shape[0], *rest]).shape, exact=x.exact)


def moved(m: Maker) -> None:
    x = m.pick(lambda v: len(v.shape) >= 1 and v.dtype != "bool" and math.prod(v.shape) <= 512)
    if not x:
        return
    rank = len(x.shape)
    axis = m.rng.randrange(rank)
    size, op = x.shape[axis], m.rng.choice(["Slice", "Concat", "Split", "Gather", "Pad", "Tile", "Expand"])

    def changed(new: int) -> list[int]:
        return [*x.shape[:axis], new, *x.shape[axis + 1 :]]

    if op == "Slice":
        start, end = m.rng.choice([0, 0, 1, -size, -1]), m.rng.choice([size, 2**31 - 1, 2**63 - 1, size - 1])
        left = len(range(size)[start : min(end, 2**31)])
        if left:
            given = [m.ints([n]) for n in (start, end, axis - m.rng.choice([0, rank]), *m.rng.choice([(), (1,)]))]
            m.add(op, [x.name, *given], x, shape=changed(left), exact=x.exact)
    elif op == "Concat":
        count = m.rng.choice([1, 1, 2])
        m.add(op, [x.name] * count, x, shape=changed(size * count), axis=axis, exact=x.exact)
    elif op == "Split":
        parts = m.rng.choice([n for n in (1, 2) if size % n == 0])
        attributes = {"num_outputs": parts} if m.opset >= 18 else {}
        names = m.node(op, [x.name], outputs=parts, axis=axis, **attributes)
        m.values += [Value(n, x.dtype, tuple(changed(size // parts)), x.low, x.high, x.exact) for n in names]
    elif op == "Gather":
        indices = [m.rng.randrange(-size, size) for _ in range(m.rng.choice([1, 2]))]
        m.add(op, [x.name, m.ints(indices)], x, shape=changed(len(indices)), axis=axis, exact=x.exact)
    elif op == "Pad" and x.floating:
        pads = [0] * (2 * rank)
        pads[axis] = m.rng.choice([0, 0, 1])
        m.add(op, [x.name, m.ints(pads)], x, shape=changed(size + pads[axis]), low=min(x.low, 0), high=max(x.high, 0))
    elif op == "Tile":
        times = m.rng.choice([1, 1, 2])
        repeats = [times if i == axis else 1 for i in range(rank)]
        m.add(op, [x.name, m.ints(repeats)], x, shape=changed(size * times), exact=x.exact)
    elif op == "Expand":
        target = m.rng.choice([list(x.shape), [1] * rank, [2, *x.shape] if rank < 4 else [1], list(x.shape[axis:])])
        m.add(op, [x.name, m.ints(target)], x, shape=_broadcast(x.shape, tuple(target)), exact=x.exact)


def reduced(m: Maker) -> None:
    x = m.floating(rank=1)
    if not x:
        return
    op, rank = m.rng.choice(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"]), len(x.shape)
    axes = m.rng.sample(range(rank), m.rng.randint(1, rank))
    count = math.prod(x.shape[axis] for axis in axes) if op == "ReduceSum" else 1
    keep = m.rng.choice([0, 1])
    shape = [1 if i in axes else size for i, size in enumerate(x.shape) if keep or i not in axes]
    if x.bound * count <= LARGEST:
        low, high = min(x.low, x.low * count), max(x.high, x.high * count)
        since = 13 if op == "ReduceSum" else 18
        given = [axis - m.rng.choice([0, rank]) for axis in axes]
        m.on_axes(op, x, given, since, shape, keepdims=keep, low=low, high=high)


def normalized(m: Maker) -> None:
    x = m.floating(rank=1)
    if x:
        low, op = (0.0, "Softmax") if m.rng.random() < 0.8 else (-2 * x.bound - 7, "LogSoftmax")
        m.add(op, [x.name], x, axis=m.rng.choice([-1, len(x.shape) - 1, 0]), low=low, high=1.0)


def layer_norm(m: Maker) -> None:
    """LayerNorm or RMSNorm in a spelling of the exporters', complete or cut short."""
    x = m.pick(lambda v: v.floating and v.bound <= 6 and v.shape[-1:] == (4,))
    if not x:
        return
    stat = (*x.shape[:-1], 1)
    centred = x
    if m.rng.random() < 0.7:
        mean = m.on_axes("ReduceMean", x, [-1], 18, stat, keepdims=1)
        centred = m.add("Sub", [x.name, mean.name], x, low=-2 * x.bound, high=2 * x.bound)
    square = ["Pow", m.constant(2.0, x.dtype)] if m.rng.random() < 0.5 else ["Mul", centred.name]
    squared = m.add(square[0], [centred.name, square[1]], x, low=0.0, high=centred.bound**2)
    variance = m.on_axes("ReduceMean", squared, [-1], 18, stat, keepdims=1)
    # An epsilon that large keeps the quotient from being all rounding where the values are nearly the same.
    shifted = m.add("Add", [variance.name, m.constant(0.25, x.dtype)], variance, low=0.25, high=variance.high + 0.25)
    root = m.add("Sqrt", [shifted.name], shifted, low=0.5, high=math.sqrt(shifted.high))
    y = m.add("Div", [centred.name, root.name], x, low=-2.0, high=2.0)
    for op in ("Mul", "Add")[: m.rng.randint(0, 2)]:
        weight = m.constant([0.5, 1.5, 1.0, -1.0], x.dtype)
        y = m.add(op, m.rng.sample([y.name, weight], 2), y, low=-2 * y.bound, high=2 * y.bound)


def gelu(m: Maker) -> None:
    """GELU with erf, tanh or sigmoid; now and then with a wrong constant."""
    x = m.floating(6.0)
    if not x:
        return

    def c(number: float) -> str:
        return m.constant(number if m.rng.random() < 0.95 else 1.5, x.dtype)

    def step(op: str, *inputs: str, bound: float) -> Value:
        return m.add(op, m.rng.sample(inputs, 2) if op in ("Add", "Mul") else inputs, x, low=-bound, high=bound)

    b, kind = x.bound, m.rng.choice(["erf", "tanh", "sigmoid"])
    if kind == "sigmoid":
        gate = step("Sigmoid", m.rng.choice([x.name, step("Mul", x.name, c(1.702), bound=2 * b).name]), bound=1.0)
        step("Mul", x.name, gate.name, bound=b)
        return
    if kind == "erf":
        inner = (
            step("Div", x.name, c(math.sqrt(2)), bound=b)
            if m.rng.random() < 0.5
            else step("Mul", x.name, c(math.sqrt(0.5)), bound=b)
        )
        curve = step("Erf", inner.name, bound=1.0)
    else:
        cube = m.add("Pow", [x.name, m.constant(3.0, x.dtype)], x, low=-(b**3), high=b**3)
        scaled = step("Mul", cube.name, c(0.044715), bound=b**3 / 20)
        total = step("Add", x.name, scaled.name, bound=b + b**3 / 20)
        curve = step("Tanh", step("Mul", total.name, c(math.sqrt(2 / math.pi)), bound=b + b**3 / 20).name, bound=1.0)
    shifted = step("Add", curve.name, c(1.0), bound=2.5)
    if m.rng.random() < 0.5:
        step("Mul", step("Mul", x.name, shifted.name, bound=2.5 * b).name, c(0.5), bound=2.5 * b)
    else:
        step("Mul", step("Mul", x.name, c(0.5), bound=b).name, shifted.name, bound=2.5 * b)


def product(m: Maker, x: Value, columns: int) -> Value:
    """MatMul or Gemm with a weight, and perhaps a bias."""
    weight = np.random.default_rng(m.rng.randrange(1000)).uniform(-0.5, 0.5, (x.shape[-1], columns))
    bound, shape = 0.5 * x.shape[-1] * x.bound, (*x.shape[:-1], columns)
    if len(x.shape) == 2 and m.rng.random() < 0.4:
        bias = [m.constant(weight[0], x.dtype)] if m.rng.random() < 0.5 else []
        flipped = m.rng.choice([0, 1])
        inputs = [x.name, m.constant(weight.T if flipped else weight, x.dtype), *bias]
        return m.add("Gemm", inputs, x, shape=shape, transB=flipped, low=-bound - 0.5, high=bound + 0.5)
    y = m.add("MatMul", [x.name, m.constant(weight, x.dtype)], x, shape=shape, low=-bound, high=bound)
    if m.rng.random() < 0.5:
        inputs = m.rng.sample([y.name, m.constant(weight[0], x.dtype)], 2)
        y = m.add("Add", inputs, y, low=y.low - 0.5, high=y.high + 0.5)
    return y


def products(m: Maker) -> None:
    """One product, or several of one tensor, or one after another."""
    x = m.floating(8.0, rank=2)
    if x:
        y = product(m, x, m.rng.choice(SIZES))
        for _ in range(m.rng.choice([0, 0, 1, 2])):
            y = product(m, m.rng.choice([x, y]), m.rng.choice(SIZES)) if y.bound <= LARGEST else y


def attention(m: Maker) -> None:
    """softmax(Q Kᵀ · scale + mask) V of [batch, heads, rows, size]."""
    x = m.pick(lambda v: v.floating and v.bound <= 3 and len(v.shape) == 3 and v.shape[2] == 4)
    if not x:
        return
    batch, rows, _ = x.shape

    def heads(keys: bool) -> Value:
        y = product(m, x, 4)
        split = m.add(
            "Reshape",
            [y.name, m.ints([0, 0, 2, 2] if m.rng.random() < 0.5 else [batch, -1, 2, 2])],
            y,
            shape=(batch, rows, 2, 2),
        )
        order = [0, 2, 3, 1] if keys else [0, 2, 1, 3]
        return m.add("Transpose", [split.name], split, shape=[split.shape[i] for i in order], perm=order)

    q, k, v = heads(False), heads(True), heads(False)
    scores = m.add(
        "MatMul",
        [q.name, k.name],
        q,
        shape=(batch, 2, rows, rows),
        low=-2 * q.bound * k.bound,
        high=2 * q.bound * k.bound,
    )
    op, scale = m.rng.choice([("Mul", 0.5**0.5), ("Div", 2**0.5), ("Div", 8.0)])
    scores = m.add(op, [scores.name, m.constant(scale, x.dtype)], scores)
    if m.rng.random() < 0.5:
        mask = np.where(np.tri(rows, dtype=bool), 0.0, m.rng.choice([-100.0, -np.inf]))
        scores = m.add("Add", [scores.name, m.constant(mask, x.dtype)], scores)
    weights = m.add("Softmax", [scores.name], scores, axis=-1, low=0.0, high=1.0)
    mixed = m.add("MatMul", [weights.name, v.name], v, low=v.low, high=v.high)
    back = m.add("Transpose", [mixed.name], mixed, shape=(batch, rows, 2, 2), perm=[0, 2, 1, 3])
    m.add("Reshape", [back.name, m.ints([0, 0, 4])], back, shape=x.shape)


def convolved(m: Maker) -> None:
    x = m.pick(lambda v: v.floating and v.bound <= 8 and len(v.shape) == 3)
    if not x:
        return
    channels, made = x.shape[1], m.rng.choice(SIZES)
    weight = np.random.default_rng(m.rng.randrange(1000)).uniform(-0.3, 0.3, (made, channels, 1))
    bias = [m.constant(weight[:, 0, 0], x.dtype)] if m.rng.random() < 0.5 else []
    bound = 0.3 * channels * x.bound + 0.3
    shape = (x.shape[0], made, x.shape[2])
    y = m.add("Conv", [x.name, m.constant(weight, x.dtype), *bias], x, shape=shape, low=-bound, high=bound)
    if m.rng.random() < 0.5:
        scale, shift, mean, variance = (np.linspace(low, 1.0, made) for low in (0.5, -0.5, 0.0, 0.5))
        given = [m.constant(array, x.dtype) for array in (scale, shift, mean, variance)]
        m.add("BatchNormalization", [y.name, *given], y, low=-2 * bound - 2, high=2 * bound + 2)


def random_or_constant(m: Maker) -> None:
    """Arithmetic of constants only."""
    a, b = (m.constant([[n, 1.0]], "float32") for n in (2.0, 0.5))
    like = Value("", "float32", (1, 2), -4.0, 4.0)
    y = m.add(m.rng.choice(["Add", "Mul"]), [a, b], like)
    m.add("Transpose", [y.name], y, shape=(2, 1))


def repeated(m: Maker) -> None:
    """A node that is there already, once more."""
    made = {value.name: value for value in m.values}
    node = m.rng.choice(m.nodes) if m.nodes else None
    if (
        node is not None
        and len(node.output) == 1
        and node.output[0] in made
        and not any(a.HasField("g") for a in node.attribute)
    ):
        copy, value = onnx.NodeProto(), made[node.output[0]]
        copy.CopyFrom(node)
        copy.output[0] = m.fresh()
        m.nodes.append(copy)
        m.values.append(Value(copy.output[0], value.dtype, value.shape, value.low, value.high, value.exact))


INSIDE = (unary, mirrored, with_number, pairwise, clipped, transposed, reshaped, moved, repeated, gelu)


def body(m: Maker, x: Value) -> tuple[Maker, Value]:
    """Nodes of a subgraph that sees everything outside; its result has the shape of `x`."""
    inner = Maker(m.rng, m.opset, m)
    inner.values = [v for v in inner.values if v.dtype == "float32"]
    for _ in range(m.rng.randint(0, 3)):
        m.rng.choice(INSIDE)(inner)
    known = {value.name for value in m.values}
    made = [v for v in inner.values if v.name not in known and v.shape == x.shape and v.bound <= LARGEST]
    return inner, made[-1] if made else inner.add("Tanh", [x.name], x, low=-1.0, high=1.0)


def branched(m: Maker) -> None:
    x = m.pick(lambda v: v.dtype == "float32" and v.bound <= LARGEST)
    if not x or m.outer:
        return
    condition = m.constant(m.rng.random() < 0.5, "bool") if m.rng.random() < 0.7 else "q"
    branches, ends = {}, []
    for name in ("then_branch", "else_branch"):
        inner, y = body(m, x)
        branches[name] = helper.make_graph(inner.nodes, name, [], [_info(y)])
        ends += [y.low, y.high]
    m.add("If", [condition], x, low=min(ends), high=max(ends), **branches)


def looped(m: Maker) -> None:
    x = m.pick(lambda v: v.dtype == "float32" and v.bound <= LARGEST)
    if not x or m.outer:
        return
    index, go, on, state, following = (m.fresh() for _ in range(5))
    m.values.append(Value(state, "float32", x.shape, -LARGEST, LARGEST))
    inner, y = body(m, m.values[-1])
    m.values = [value for value in m.values if value.name != state]
    limit = [m.constant(-LARGEST, "float32"), m.constant(LARGEST, "float32")]
    inner.nodes.insert(0, helper.make_node("Identity", [go], [on]))
    inner.nodes.append(helper.make_node("Clip", [y.name, *limit], [following]))
    scalars = [helper.make_tensor_value_info(name, dtype, []) for name, dtype in ((index, 7), (go, 9), (on, 9))]
    states = [helper.make_tensor_value_info(name, 1, x.shape) for name in (state, following)]
    graph = helper.make_graph(inner.nodes, "body", [*scalars[:2], states[0]], [scalars[2], states[1]])
    condition = m.rng.choice(["", m.constant(m.rng.random() < 0.7, "bool")])
    m.add(
        "Loop",
        [m.constant(m.rng.choice([0, 1, 1, 2]), "int64"), condition, x.name],
        x,
        low=-LARGEST,
        high=LARGEST,
        body=graph,
    )


def _info(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(value.name, DTYPES[value.dtype], [None] * len(value.shape))


STEPS = (
    *(unary, mirrored, jumping, positive, with_number, with_number, pairwise, pairwise, clipped, cast, cast),
    *(compared, logical, where, transposed, transposed, reshaped, reshaped, shape_arithmetic, moved, moved),
    *(reduced, normalized, layer_norm, gelu, products, attention, convolved, random_or_constant, repeated),
    *(branched, looped),
)


def make_model(rng: random.Random) -> onnx.ModelProto:
    """5 to 60 nodes, or a few more where the last step makes many."""
    m = Maker(rng, rng.choice([13, 17, 18, 20, 22]))
    inputs = []
    for index, dtype in enumerate(
        rng.choice([["float32"], ["float32", "float32"], ["float32", "float16"], ["float32", "int64"]])
    ):
        shape = (BATCH, *(rng.choice(SIZES) for _ in range(rng.randint(0, 2))), 4)
        low, high = (-3.0, 3.0) if dtype != "int64" else (0.0, 2.0)
        m.values.append(Value(f"x{index}", dtype, shape, low, high, exact=True))
        inputs.append(helper.make_tensor_value_info(f"x{index}", DTYPES[dtype], [rng.choice(["N", BATCH]), *shape[1:]]))
    inputs.append(helper.make_tensor_value_info("q", TensorProto.BOOL, []))
    wanted = rng.randint(5, 60)
    for _ in range(10 * wanted):
        if len(m.nodes) >= wanted:
            break
        rng.choice(STEPS)(m)
    made = [value for value in m.values if not value.name.startswith("x")] or [m.add("Neg", ["x0"], m.values[0])]
    read = {name for node in m.nodes for name in node.input}
    sinks = [value for value in made if value.name not in read]
    outputs = {v.name: v for v in (*rng.sample(sinks, min(len(sinks), 4)), *rng.sample(made, min(len(made), 2)))}
    used = _names_read(m.nodes)
    graph = helper.make_graph(
        m.nodes, "random", inputs, [_info(v) for v in outputs.values()], [i for i in m.initializers if i.name in used]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", m.opset)], ir_version=10)


def _names_read(nodes: Any) -> set[str]:
    read = {name for node in nodes for name in node.input}
    return read.union(*(_names_read(a.g.node) for node in nodes for a in node.attribute if a.HasField("g")))


# Running them


@pytest.fixture(scope="session")
def random_model() -> Callable[[random.Random], onnx.ModelProto]:
    """Makes a valid model of 5 to 60 nodes; the same one for the same state of the generator."""
    return make_model
