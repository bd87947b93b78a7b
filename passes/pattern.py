"""The pattern language of `passes/rewrite.py`: what its functions are called with, and what they make."""

from __future__ import annotations

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from llmc.passes.graph import Array, Constant, Node, Tensor, Variable, Weights, numpy_dtype

ATTRIBUTE_BECAME_INPUT: dict[str, dict[str, tuple[int, int]]] = {
    **{
        f"Reduce{kind}": {"axes": (1, 18)} for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod")
    },
    "ReduceSum": {"axes": (1, 13)},
    "Squeeze": {"axes": (1, 13)},
    "Unsqueeze": {"axes": (1, 13)},
    "Clip": {"min": (1, 11), "max": (2, 11)},
    "Pad": {"pads": (1, 11)},
    "Slice": {"starts": (1, 10), "ends": (2, 10), "axes": (3, 10)},
    "Split": {"split": (1, 13)},
    "TopK": {"k": (1, 10)},
}
"""Operator → attribute → (input position, opset from which it is an input). Patterns name it as an attribute always."""


class Weight:
    """Annotation: the parameter is a constant of any shape."""


class Scalar:
    """Annotation: the parameter is a constant with one element; `check` and `replace` get a float."""


class Attribute:
    """Annotation: the parameter is the value of an attribute."""


class Attributes:
    """Annotation: all attributes of a node that the pattern does not name, whatever they are, as a dict.

    `op.Conv(x, weight, others=attributes)` matches them and, in a replacement, sets them again; the keyword is free.
    """


class Rest:
    """Annotation: the parameter is the list of all inputs from this one on."""


KINDS = {kind.__name__: kind for kind in (Weight, Scalar, Attribute, Attributes, Rest)}


# What a pattern is made of


@dataclass(frozen=True, eq=False)
class Parameter:
    name: str
    kind: type | None


@dataclass(frozen=True, eq=False)
class Operator:
    op: str
    domain: str
    inputs: tuple[Value | None, ...]
    attributes: dict[str, object]


@dataclass(frozen=True, eq=False)
class Output:
    operator: Operator
    index: int


@dataclass(frozen=True, eq=False)
class Either:
    options: tuple[Value | None, ...]


Value = Parameter | Output | Either | float | int


class Tracer:
    """`op` while a pattern is read: every call makes a piece of the pattern."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*inputs: Value | None, outputs: int = 1, domain: str = "", **attributes: object) -> Any:
            made = Operator(name, domain, inputs, attributes)
            values = tuple(Output(made, i) for i in range(outputs))
            return values[0] if outputs == 1 else values

        return call

    def either(self, *options: Value | None) -> Value:
        """Any of the options."""
        return Either(options)

    def optional(self, value: Value) -> Value:
        """The value, or an input that is left out; parameters in it are None then."""
        return self.either(value, None)


class Builder:
    """`op` while nodes are made: in a replacement, or in an example that is built from a pattern.

    Numbers become constants of the type of the first tensor input; an attribute that is None is left out. `choose`
    says which option of each `either` to take, in the order of the calls (examples only).
    """

    def __init__(
        self, opset: int, fresh: Callable[[str], str], scope: str, choose: Sequence[int] | None = None
    ) -> None:
        self._opset, self._fresh, self._scope = opset, fresh, scope
        self._choices = iter(choose) if choose is not None else None
        self.nodes: list[Node] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*wanted: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
            inputs = [i for w in wanted for i in (w if isinstance(w, list | tuple) else (w,))]
            like = next((i.dtype for i in inputs if isinstance(i, Tensor) and i.dtype is not None), np.float32)
            given = [self._tensor(i, like) for i in inputs]
            for key in [key for key, value in attributes.items() if isinstance(value, dict)]:
                attributes |= attributes.pop(key)
            kept = {key: value for key, value in attributes.items() if value is not None}
            for key, (position, since) in sorted(ATTRIBUTE_BECAME_INPUT.get(name, {}).items(), key=lambda e: e[1]):
                if key in attributes and self._opset >= since:
                    given.extend(Variable.empty() for _ in range(position - len(given)))
                    given.insert(position, self._attribute_input(kept.pop(key, None), like))
            node_name = self._fresh(f"{self._scope}.{name}" if self._scope else name)
            dtype = _result_dtype(name, attributes, given, like)
            made = [Variable(self._fresh(f"{node_name}_out"), dtype=dtype) for _ in range(outputs)]
            while given and given[-1].is_empty():
                given.pop()
            self.nodes.append(Node(name, node_name, kept, given, made, domain or None))
            return made[0] if outputs == 1 else tuple(made)

        return call

    def either(self, *options: Any) -> Any:
        if self._choices is None:
            raise TypeError("`either` belongs into patterns: a replacement is one thing")
        return options[next(self._choices)]

    def optional(self, value: Any) -> Any:
        return self.either(value, None)

    def _attribute_input(self, value: object, like: Any) -> Tensor:
        """What was an attribute once: integers stay integers, numbers get the type of the first tensor input."""
        if value is None:
            return Variable.empty()
        array = np.asarray(value)
        return self._tensor(array.astype(like) if array.dtype.kind == "f" else array, like)

    def _tensor(self, value: Tensor | Array | Weights | float | None, like: Any) -> Tensor:
        if value is None:
            return Variable.empty()
        if isinstance(value, Tensor):
            return value
        held = value if isinstance(value, np.ndarray | Weights) else np.asarray(value, dtype=like)
        return Constant(self._fresh(f"{self._scope}.constant" if self._scope else "constant"), held)


def _result_dtype(op: str, attributes: dict[str, Any], inputs: Sequence[Tensor], like: Any) -> Any:
    """The type that most operators make is that of their first tensor input; here are the others that rules use."""
    if op == "Cast":
        return numpy_dtype(attributes["to"])
    if op == "QuantizeLinear" and len(inputs) > 2:
        return inputs[2].dtype
    return np.dtype(np.int64) if op in ("Shape", "Size") else like


# Rules


class Rewrite(ABC):
    """One rule. `opset` is the lowest that has every operator of `replace`."""

    opset: ClassVar[int] = 1
    newest_opset: ClassVar[int] = 1_000
    """Above this one the rule holds back, because `too_new`."""
    too_new: ClassVar[str] = ""
    since: ClassVar[int] = 1
    """The lowest opset that has every operator of `pattern`."""
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16", "bfloat16")
    """Floating types that the rule is proved in."""
    symbolic: ClassVar[bool] = True
    """Whether it fires where the first dimension of an input is a name."""

    @abstractmethod
    def pattern(self, op: Any, *parameters: Any) -> Any:
        """What stands there: the value (or tuple of values) that the pattern makes."""

    @abstractmethod
    def replace(self, op: Any, *parameters: Any) -> Any:
        """What shall stand there: as many values as the pattern makes. Gets the pattern's parameters that it names."""

    def check(self, *parameters: Any) -> str | None:  # noqa: ARG002 - what subclasses name
        """Why this match must be left alone, or None. Gets the pattern's parameters that it names."""
        return None

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        """Parameters of a graph that shows the pattern: name → shape of a tensor or weight, number, or attribute."""
        rank = int(rng.integers(2, 5))
        shape = tuple(int(n) for n in rng.integers(2, 6, rank))
        return {p.name: shape for p in self.parameters}

    @property
    def name(self) -> str:
        return type(self).__name__

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        signature = list(inspect.signature(self.pattern).parameters.values())[1:]
        return tuple(Parameter(p.name, KINDS.get(str(p.annotation).rpartition(".")[2])) for p in signature)

    @cached_property
    def values(self) -> tuple[Any, ...]:
        """The values that the pattern makes; the first may be an `either`, the others are outputs of operators."""
        made = self.pattern(Tracer(), *self.parameters)
        return made if isinstance(made, tuple) else (made,)

    @cached_property
    def roots(self) -> tuple[tuple[Output, ...], ...]:
        """The pattern's values, once for each option where the first is an `either`."""
        return tuple((first, *self.values[1:]) for first in _options(self.values[0]))

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """Every operator of the pattern, each once, from the root inwards."""
        found: dict[int, Operator] = {}

        def visit(value: Value | None) -> None:
            if isinstance(value, Either):
                for option in value.options:
                    visit(option)
            elif isinstance(value, Output) and id(value.operator) not in found:
                found[id(value.operator)] = value.operator
                for source in value.operator.inputs:
                    visit(source)

        for value in self.values:
            visit(value)
        return tuple(found.values())

    @cached_property
    def heart(self) -> Operator:
        """The operator that tells the pattern best: in every alternative of it, once, and rare in the wild.

        Of several, the innermost. Where it stands unmatched, the user hears why.
        """
        needed = list(_required(self.values[0]).values())[::-1]
        if not needed:
            raise TypeError(f"{self.name}: the options of its `either` share no operator: make them rules of their own")
        kinds = [o.op for o in needed]
        rarity = {op: rank for rank, op in enumerate(_COMMON, 1)}
        return min(needed, key=lambda o: (o.op in _ARITHMETIC, kinds.count(o.op), rarity.get(o.op, 0)))

    @cached_property
    def paths(self) -> tuple[tuple[Operator, ...], ...]:
        """Operators from the heart's user up to the root, for each way through the pattern's options."""

        def users(value: Value | None, above: tuple[Operator, ...]) -> Iterator[tuple[Operator, ...]]:
            if isinstance(value, Either):
                for option in value.options:
                    yield from users(option, above)
            elif isinstance(value, Output):
                if value.operator is self.heart:
                    yield above
                for source in value.operator.inputs:
                    yield from users(source, (value.operator, *above))

        return tuple(users(self.values[0], ()))

    @cached_property
    def alternatives(self) -> tuple[tuple[int, ...], ...]:
        """Every way to choose among the pattern's `either` calls."""
        arities: list[int] = []

        class Count(Tracer):
            def either(self, *options: Value | None) -> Value:
                arities.append(len(options))
                return super().either(*options)

        self.pattern(Count(), *self.parameters)
        return tuple(itertools.product(*map(range, arities)))


_ARITHMETIC = {"Sub", "Div", "Mul", "Add", "Cast"}
_COMMON = (
    "Conv",
    "ReduceMean",
    "Sqrt",
    "Sub",
    "Div",
    "Softmax",
    "Transpose",
    "Reshape",
    "MatMul",
    "Cast",
    "Mul",
    "Add",
)


def _options(value: Value | None) -> Iterator[Output]:
    if isinstance(value, Either):
        for option in value.options:
            yield from _options(option)
    elif isinstance(value, Output):
        yield value


def _required(value: Value | None) -> dict[int, Operator]:
    """The operators that `value` has whichever option of each `either` is taken, from the root inwards."""
    if isinstance(value, Either):
        first, *others = (_required(option) for option in value.options)
        return {key: operator for key, operator in first.items() if all(key in other for other in others)}
    found: dict[int, Operator] = {}
    if isinstance(value, Output):
        found[id(value.operator)] = value.operator
        for source in value.operator.inputs:
            found.update(_required(source))
    return found
