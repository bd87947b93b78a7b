"""The pass `decompose-einsum`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np

from llmc.passes.graph import Tensor, shape_of
from llmc.passes.rewrite import Attribute, Rest, Rewrite, RewritePass

Labels = tuple[str, ...]
EQUATION = re.compile(r"[A-Za-z.]*(,[A-Za-z.]*)*(->[A-Za-z.]*)?")


class _RefusalError(Exception):
    """Why an equation is left alone."""


@dataclass(frozen=True)
class Equation:
    """What an Einsum computes: the labels of each operand's axes and of the result's, and the sizes that are known.

    The axes that '...' stands for are labelled '.0', '.1' … from the last one on.
    """

    text: str
    operands: tuple[Labels, ...]
    result: Labels
    sizes: dict[str, int]

    def size(self, labels: Sequence[str]) -> int:
        """The product of sizes; -1 where one of them is not known."""
        known = [self.sizes.get(label, -1) for label in labels]
        return -1 if -1 in known else prod(known)


def read_equation(text: str, tensors: Sequence[Tensor]) -> Equation:
    """Raises _RefusalError for an equation that does not fit the operands, or takes a diagonal."""
    compact = text.replace(" ", "")
    if not EQUATION.fullmatch(compact):
        raise _RefusalError(f"'{text}' is no equation of Einsum")
    left, arrow, right = compact.partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors):
        raise _RefusalError(f"'{text}' has {len(terms)} terms for {len(tensors)} operands")
    operands = tuple(_operand(text, term, tensor) for term, tensor in zip(terms, tensors, strict=True))
    every = [label for labels in operands for label in labels]
    hidden = max(([n for n in labels if n[0] == "."] for labels in operands), key=len)
    if arrow:
        before, dots, behind = right.partition("...")
        result: Labels = (*before, *(hidden if dots else ()), *behind)
    else:
        result = (*hidden, *sorted(n for n in every if n[0] != "." and every.count(n) == 1))
    if len(set(result)) != len(result) or not set(every) >= set(result) >= set(hidden):
        raise _RefusalError(f"the result of '{text}' does not have axes of its operands, once each")
    return Equation(text, operands, result, _sizes(text, operands, tensors))


def _operand(text: str, term: str, tensor: Tensor) -> Labels:
    shape = shape_of(tensor)
    if shape is None:
        raise _RefusalError(f"the rank of '{tensor.name}' is not known")
    before, dots, behind = term.partition("...")
    hidden = len(shape) - len(before) - len(behind)
    labels = (*before, *(f".{i}" for i in reversed(range(hidden))), *behind)
    if hidden < 0 or (hidden and not dots) or "." in labels:
        raise _RefusalError(f"'{term}' in '{text}' does not fit '{tensor.name}' with {len(shape)} axes")
    if len(set(labels)) != len(labels):
        raise _RefusalError(f"'{term}' in '{text}' takes a diagonal")
    return labels


def _sizes(text: str, operands: Sequence[Labels], tensors: Sequence[Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for labels, tensor in zip(operands, tensors, strict=True):
        for label, size in zip(labels, tensor.shape, strict=True):
            if not isinstance(size, int):
                continue
            if size == 0:
                raise _RefusalError(f"'{tensor.name}' is empty")
            other = found.get(label, size)
            if other != size and not (label[0] == "." and 1 in (other, size)):
                raise _RefusalError(f"'{label}' in '{text}' is {other} and {size}")
            found[label] = max(other, size)
    return found


@dataclass(frozen=True)
class Product:
    """An Einsum of two operands as a product of matrices [lead…, left, summed] · [lead…, summed, right].

    The `…_shape` are what operands and result are reshaped to, where several axes stand for one; None where not.
    """

    first: Labels
    second: Labels
    made: Labels
    first_shape: list[int] | None
    second_shape: list[int] | None
    made_shape: list[int] | None


def product_of(equation: Equation) -> Product:
    """The product of an equation that sums over labels of both operands. Raises _RefusalError."""
    a, b = equation.operands
    batch = tuple(n for n in equation.result if n in a and n in b)
    left = tuple(n for n in equation.result if n in a and n not in b)
    right = tuple(n for n in equation.result if n in b and n not in a)
    summed = tuple(n for n in a if n in b and n not in equation.result)
    # Without a batch, all left axes but the last may be one for the first operand alone: MatMul repeats the second.
    lead = batch or left[:-1]
    left = left if batch else left[-1:]
    return Product(
        first=(*lead, *left, *summed),
        second=(*batch, *summed, *right),
        made=(*lead, *left, *right),
        first_shape=_merged(equation, len(lead), left, summed),
        second_shape=_merged(equation, len(batch), summed, right),
        made_shape=_split(equation, len(lead), left, right),
    )


def _merged(equation: Equation, leading: int, *groups: Labels) -> list[int] | None:
    """The shape that makes one axis of each group, after `leading` axes that stay."""
    if all(len(group) == 1 for group in groups):
        return None
    first, second = groups
    return _target(equation, [0] * leading + [0 if len(first) == 1 else equation.size(first), equation.size(second)])


def _split(equation: Equation, leading: int, left: Labels, right: Labels) -> list[int] | None:
    """The shape that makes the axes of two groups of one axis each, after `leading` axes that stay."""
    if len(left) == len(right) == 1:
        return None
    lefts = [0] if len(left) == 1 else [equation.size((n,)) for n in left]
    return _target(equation, [0] * leading + lefts + [equation.size((n,)) for n in right])


def _target(equation: Equation, shape: list[int]) -> list[int]:
    if shape.count(-1) > 1:
        raise _RefusalError(f"'{equation.text}' merges axes whose sizes are not known")
    return shape


class EinsumOfMatrices(Rewrite):
    """A product of matrices; of numbers where nothing is summed over, of vectors where everything is."""

    opset = 12

    def pattern(self, op: Any, operands: Rest, equation: Attribute) -> Any:
        return op.Einsum(operands, equation=equation)

    def check(self, operands: Any, equation: Any) -> str | None:
        if len(operands) > 2:
            return f"'{equation}' has {len(operands)} operands, one or two are written anew"
        try:
            found = read_equation(equation, operands)
            if len(operands) == 2:
                product_of(found)
        except _RefusalError as refusal:
            return str(refusal)
        return None

    def replace(self, op: Any, operands: Any, equation: Any) -> Any:
        found = read_equation(equation, operands)
        given = [_summed_out(op, found, index, tensor) for index, tensor in enumerate(operands)]
        if len(given) == 1:
            made = _arranged(op, *given[0], found.result)
            return op.Identity(made) if made is operands[0] else made
        shared = {*found.operands[0]} & {*found.operands[1]}
        summed = tuple(n for n in found.operands[0] if n in shared and n not in found.result)
        if summed and not shared.issuperset(found.result):
            return _matrices(op, product_of(found), given, found.result)
        order = (*found.result, *summed)
        made = op.Mul(*(_arranged(op, tensor, labels, order) for tensor, labels in given))
        return op.ReduceSum(made, axes=list(range(len(found.result), len(order))), keepdims=0) if summed else made

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        equation, *operands = _EXAMPLES[int(rng.integers(len(_EXAMPLES)))]
        return {"operands": operands, "equation": equation}


_EXAMPLES: tuple[tuple[Any, ...], ...] = (
    ("bqhd,bkhd->bhqk", (2, 3, 4, 5), (2, 6, 4, 5)),
    ("bhqk,bkhd->bqhd", (2, 4, 3, 6), (2, 6, 4, 5)),
    ("bsd,de->bse", (2, 3, 4), (4, 5)),
    ("...ij,...jk->...ik", (2, 3, 4, 5), (2, 3, 5, 6)),
    ("i,j->ij", (3,), (4,)),
    ("bi,bi->b", (2, 5), (2, 5)),
    ("abc->ca", (2, 3, 4)),
)


def _matrices(op: Any, product: Product, given: Sequence[tuple[Tensor, Labels]], result: Labels) -> Any:
    factors = []
    for (tensor, labels), order, shape in zip(
        given, (product.first, product.second), (product.first_shape, product.second_shape), strict=True
    ):
        arranged = _arranged(op, tensor, labels, order)
        factors.append(arranged if shape is None else op.Reshape(arranged, np.array(shape, np.int64)))
    made = op.MatMul(*factors)
    if product.made_shape is not None:
        made = op.Reshape(made, np.array(product.made_shape, np.int64))
    return _arranged(op, made, product.made, result)


def _summed_out(op: Any, equation: Equation, index: int, tensor: Tensor) -> tuple[Tensor, Labels]:
    """An operand without the axes that nothing but itself has, and their labels."""
    labels = equation.operands[index]
    others = {n for i, other in enumerate(equation.operands) if i != index for n in other}
    alone = [i for i, n in enumerate(labels) if n not in others and n not in equation.result]
    if not alone:
        return tensor, labels
    return op.ReduceSum(tensor, axes=alone, keepdims=0), tuple(n for i, n in enumerate(labels) if i not in alone)


def _arranged(op: Any, tensor: Tensor, labels: Labels, order: Labels) -> Any:
    """The axes put in `order`; those that the tensor does not have are of size 1."""
    own = [n for n in order if n in labels]
    perm = [labels.index(n) for n in own]
    if perm != sorted(perm):
        tensor = op.Transpose(tensor, perm=perm)
    missing = [i for i, n in enumerate(order) if n not in labels]
    return op.Unsqueeze(tensor, axes=missing) if missing else tensor


class DecomposeEinsum(RewritePass):
    """Writes Einsum of one or two operands with MatMul, Transpose, Reshape, Mul and ReduceSum.

    a and b any shapes, floating: `Einsum(q, k, "bqhd,bkhd->bhqk")` → `MatMul(Transpose(q), Transpose(k))`; several
    axes that are summed over, or that one operand has alone, are merged by Reshape; `"i,j->ij"` → Mul of unsqueezed
    operands; `"bi,bi->b"` → Mul and ReduceSum; `"bij->bji"` → Transpose; `...` as leading or inner axes. Left alone:
    three and more operands, diagonals (`"ii->i"`), and merging where more than one size is unknown.

    **Safety:** tolerance; the same sums, in another order (float32: 1e-6 of the largest value).

    Source: ONNX operator Einsum-12.
    """

    safety: ClassVar = "tolerance"
    rules: ClassVar = (EinsumOfMatrices(),)
