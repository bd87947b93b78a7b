"""Rules that look at one node and at what made its inputs, never at what reads its results.

Such rules need one walk in graph order: by the time that a node is looked at, all before it are as simple as they get.
A rule answers with the tensor that the node's first output equals, with the node to put in its place, or None.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np

from llmc.passes.graph import Array, Constant, Node, Tensor, constant_bytes, load_values
from llmc.passes.pattern import ATTRIBUTE_BECAME_INPUT

READ_UP_TO = 1 << 20
"""Bytes up to which a constant is read to see what it is filled with: biases are, embeddings are not."""


class StaysError(Exception):
    """Why a node that a rule nearly fits has to stay."""


@dataclass(frozen=True)
class Instead:
    """The node to put in a node's place, for the same outputs; arrays among the inputs become constants."""

    op: str
    inputs: tuple[Tensor | Array, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """A node of ONNX's own domain, as rules look at it."""

    node: Node
    opset: int

    @property
    def op(self) -> str:
        return self.node.op

    @property
    def attributes(self) -> dict[str, Any]:
        return self.node.attrs

    @property
    def inputs(self) -> list[Tensor]:
        return cast("list[Tensor]", self.node.inputs)

    @property
    def result(self) -> Tensor:
        """The first output."""
        return self.node.outputs[0]

    @property
    def told(self) -> bool:
        """Whether every input after the first is a constant, or left out."""
        return all(isinstance(tensor, Constant) or tensor.is_empty() for tensor in self.inputs[1:])

    def given(self, index: int) -> Tensor | None:
        """The input at a position, None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) and not self.inputs[index].is_empty() else None

    def integers(self, name: str) -> list[int] | None:
        """A constant list that is an attribute in early opsets and an input since; None where it is left out."""
        position, since = ATTRIBUTE_BECAME_INPUT.get(self.op, {}).get(name, (0, 1 << 30))
        if self.opset < since:
            return cast("list[int] | None", self.attributes.get(name))
        tensor = self.given(position)
        return None if tensor is None else listed(tensor)

    def before(self, operators: Iterable[str]) -> Site | None:
        """The node that makes the first input as its first output, where it is one of these operators of ONNX."""
        tensor = self.inputs[0]
        if isinstance(tensor, Constant) or not tensor.inputs:
            return None
        node = tensor.inputs[0]
        found = node.op in operators and not node.domain and node.outputs[0] is tensor
        return Site(node, self.opset) if found else None


Outcome: TypeAlias = "Tensor | Instead | None"
Rule = Callable[[Site], Outcome]


class Rules:
    """Operator → the rules for it, by name, in the order in which they are tried. Calling it registers a function."""

    def __init__(self, *others: Rules) -> None:
        self.by_operator: dict[str, list[tuple[str, Rule]]] = defaultdict(list)
        for other in others:
            for operator, rules in other.by_operator.items():
                self.by_operator[operator].extend(rules)

    def __call__(self, *operators: str) -> Callable[[Rule], Rule]:
        def register(function: Rule) -> Rule:
            for operator in operators:
                self.by_operator[operator].append((function.__name__.replace("_", "-"), function))
            return function

        return register


def listed(tensor: Tensor) -> list[int]:
    """The values of a constant list of integers."""
    return [int(value) for value in load_values(cast(Constant, tensor)).reshape(-1)]


def filled_with(tensor: Tensor, number: float) -> bool:
    """Whether a tensor is a small constant of this number alone."""
    if not isinstance(tensor, Constant) or constant_bytes(tensor) > READ_UP_TO or np.dtype(tensor.dtype).kind in "OSU":
        return False
    values = load_values(tensor)
    return values.size > 0 and bool(values.flat[0] == number) and bool((values == number).all())
