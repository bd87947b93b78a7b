"""Divides the channels of an activation by numbers, by dividing constants before it: exact, and free when it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import cast

import numpy as np

from llmc.passes.graph import (
    Array,
    Constant,
    Node,
    Rowwise,
    Tensor,
    loaded,
    onnx_dtype,
    rewire,
    rows_of,
)
from llmc.passes.precision.qdq import producer

Names = Callable[[str], str]


@dataclass(frozen=True)
class Division:
    """A constant that one node reads, and what it is to be divided by; `divisor` broadcasts with it."""

    node: Node
    index: int
    divisor: Array

    def apply(self, fresh: Names) -> None:
        """Let the node read the quotient, under a name of its own; other readers of the constant keep it."""
        constant = cast(Constant, self.node.inputs[self.index])
        rewire([(self.node, self.index, quotient(constant, self.divisor, fresh))])


class Refusal(str):
    """Why an activation cannot be divided."""

    __slots__ = ()


def quotient(constant: Constant, divisor: Array, fresh: Names) -> Constant:
    """A constant divided, in its own type; computed from the old one whenever its values are asked for."""
    dtype, held = np.dtype(constant.dtype), constant._values  # as they are now
    shape = np.broadcast_shapes(tuple(constant.shape), divisor.shape)
    by = np.broadcast_to(divisor, shape)

    def divided(rows: slice) -> Array:
        values = rows_of(held, rows) if tuple(held.shape) == shape else np.broadcast_to(loaded(held), shape)[rows]
        made: Array = (values.astype(np.float32) / (by[rows] if shape else by)).astype(dtype)
        return made

    return Constant(fresh(f"{constant.name}_scaled"), Rowwise(onnx_dtype(constant), shape, divided))


def divide(tensor: Tensor, divisor: Array, readers: Iterable[Node], outputs: Set[int]) -> list[Division] | Refusal:
    """What divides the last axis of `tensor` by `divisor` [channels], where only `readers` read it.

    The path goes back through additions, products, Split and attention's values to the constants of a normalisation or
    of a product. `outputs` are the ids of tensors that the graph gives back.
    """
    if id(tensor) in outputs:
        return Refusal(f"'{tensor.name}' is an output of the graph")
    allowed = {id(node) for node in readers}
    other = next((node for node in tensor.outputs if id(node) not in allowed), None)
    if other is not None:
        return Refusal(f"'{tensor.name}' goes to {other.op} '{other.name}' too")
    if not tensor.inputs:
        return Refusal(f"'{tensor.name}' is no node's result")
    node = tensor.inputs[0]
    way = _WAYS.get(node.op) if node.domain in (None, "", "ai.onnx") else None
    if way is None:
        return Refusal(f"'{tensor.name}' is made by {node.op}, which nothing can be taken through")
    return way(tensor, divisor, outputs)


def _norm(tensor: Tensor, divisor: Array, _outputs: Set[int]) -> list[Division] | Refusal:
    node = tensor.inputs[0]
    given = [i for i in (1, 2) if len(node.inputs) > i and not node.inputs[i].is_empty()]
    if node.attrs.get("axis", -1) != -1 or any(tuple(node.inputs[i].shape or ()) != divisor.shape for i in given):
        return Refusal(f"{node.op} '{node.name}' normalises more than the last axis")
    return _constants(node, dict.fromkeys(given, divisor))


def _constants(node: Node, divisors: dict[int, Array]) -> list[Division] | Refusal:
    unknown = next((i for i in divisors if not isinstance(node.inputs[i], Constant)), None)
    if unknown is not None:
        return Refusal(f"'{node.inputs[unknown].name}' of {node.op} '{node.name}' is not constant")
    return [Division(node, i, divisor) for i, divisor in divisors.items()]


def _sum(tensor: Tensor, divisor: Array, outputs: Set[int]) -> list[Division] | Refusal:
    """Each term is divided."""
    node = tensor.inputs[0]
    if node.inputs[0] is node.inputs[1]:
        return Refusal(f"{node.op} '{node.name}' adds a tensor to itself")
    found: list[Division] = []
    for index in range(len(node.inputs)):
        part = _operand(node, index, divisor, outputs)
        if isinstance(part, Refusal):
            return part
        found += part
    return found


def _product(tensor: Tensor, divisor: Array, outputs: Set[int]) -> list[Division] | Refusal:
    """One factor is divided: a constant first, else the first that can be; of a quotient, what is divided."""
    node = tensor.inputs[0]
    if node.inputs[0] is node.inputs[1]:
        return Refusal(f"{node.op} '{node.name}' multiplies a tensor with itself")
    order = sorted(range(2), key=lambda i: not isinstance(node.inputs[i], Constant))
    refusals = []
    for index in order if node.op == "Mul" else [0]:
        found = _operand(node, index, divisor, outputs)
        if not isinstance(found, Refusal):
            return found
        refusals.append(found)
    return refusals[0]


def _operand(node: Node, index: int, divisor: Array, outputs: Set[int]) -> list[Division] | Refusal:
    tensor = node.inputs[index]
    if isinstance(tensor, Constant):
        return [Division(node, index, divisor)]
    shape = tensor.shape
    if shape is None or len(shape) == 0 or shape[-1] != divisor.size:
        return Refusal(f"'{tensor.name}' is not known to have {divisor.size} channels")
    return divide(tensor, divisor, [node], outputs)


def _through(tensor: Tensor, divisor: Array, outputs: Set[int]) -> list[Division] | Refusal:
    node = tensor.inputs[0]
    return divide(node.inputs[0], divisor, [node], outputs)


def _split(tensor: Tensor, divisor: Array, outputs: Set[int]) -> list[Division] | Refusal:
    """The channels of the other parts are divided by 1."""
    node = tensor.inputs[0]
    shapes = [part.shape for part in node.outputs]
    known = all(shape and isinstance(shape[-1], int) for shape in shapes)
    if not known or node.attrs.get("axis", 0) not in (-1, len(shapes[0]) - 1):
        return Refusal(f"Split '{node.name}' does not split channels, or their number is not known")
    ones = [np.ones(shape[-1], divisor.dtype) for shape in shapes]
    whole = np.concatenate([divisor if part is tensor else one for part, one in zip(node.outputs, ones, strict=True)])
    return divide(node.inputs[0], whole, [node], outputs)


def _attention(tensor: Tensor, divisor: Array, outputs: Set[int]) -> list[Division] | Refusal:
    """Attention is linear in its values; a channel of the result is one of the values where no head is shared."""
    node = tensor.inputs[0]
    values, heads = node.inputs[2], [node.attrs.get(name) for name in ("q_num_heads", "kv_num_heads")]
    if tensor is not node.outputs[0] or heads[0] is None or heads[0] != heads[1] or values in node.inputs[:2]:
        return Refusal(f"the heads of Attention '{node.name}' share their values, or stand on an axis of their own")
    return divide(values, divisor, [node], outputs)


def _matmul(tensor: Tensor, divisor: Array, _outputs: Set[int]) -> list[Division] | Refusal:
    return _weight(tensor.inputs[0], divisor, -1)


def _gemm(tensor: Tensor, divisor: Array, _outputs: Set[int]) -> list[Division] | Refusal:
    node = tensor.inputs[0]
    weight = _weight(node, divisor, -2 if node.attrs.get("transB", 0) else -1)
    if isinstance(weight, Refusal) or len(node.inputs) < 3 or node.inputs[2].is_empty():
        return weight
    bias = _constants(node, {2: divisor})
    return bias if isinstance(bias, Refusal) else [*weight, *bias]


def _weight(node: Node, divisor: Array, axis: int) -> list[Division] | Refusal:
    """The columns of a constant weight, or the scales that it is dequantized with, are divided."""
    weight = node.inputs[1]
    if isinstance(weight, Constant):
        if len(weight.shape) < 2:
            return Refusal(f"the weight of {node.op} '{node.name}' is a vector")
        return [Division(node, 1, _along(divisor, axis, len(weight.shape)))]
    dequantize = producer(weight, "DequantizeLinear")
    if dequantize is None or len(weight.outputs) > 1:
        return Refusal(f"the weight of {node.op} '{node.name}' is not a constant of its own")
    scale, rank = dequantize.inputs[1], len(weight.shape)
    blocked = len(scale.shape) == rank
    if not blocked and (len(scale.shape) != 1 or (dequantize.attrs.get("axis", 1) - axis) % rank):
        return Refusal(f"the weight of {node.op} '{node.name}' is not quantized by its output channels")
    return _constants(dequantize, {1: _along(divisor, axis, rank) if blocked else divisor})


def _along(divisor: Array, axis: int, rank: int) -> Array:
    shape = [1] * rank
    shape[axis] = -1
    return divisor.reshape(shape)


_Way = Callable[[Tensor, Array, Set[int]], "list[Division] | Refusal"]
_WAYS: dict[str, _Way] = {
    "Add": _sum,
    "Attention": _attention,
    "Cast": _through,
    "Div": _product,
    "Gemm": _gemm,
    "Identity": _through,
    "LayerNormalization": _norm,
    "MatMul": _matmul,
    "Mul": _product,
    "RMSNormalization": _norm,
    "Split": _split,
    "Sub": _sum,
}
"""Operator → how the result's channels are divided by way of what the operator reads."""
