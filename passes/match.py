"""Finds where a rule fits, and remembers the first thing that stopped it where it does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import numpy as np
import onnx

from llmc.passes.graph import Array, Constant, Node, Tensor, constant_source, constant_value, onnx_dtype
from llmc.passes.pattern import (
    ATTRIBUTE_BECAME_INPUT,
    Attributes,
    Either,
    Operator,
    Output,
    Parameter,
    Rest,
    Rewrite,
    Scalar,
    Value,
    Weight,
)

COMMUTATIVE = {"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum"}
BROADCASTING = COMMUTATIVE | {"Sub", "Div", "Pow", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Where"}
RELATIVE_TOLERANCE = 1e-3
"""Constants match within this: FP16 has 11 bits, so a rounded constant is off by at most 2^-11 = 4.9e-4."""
BFLOAT16_TOLERANCE = 4e-3
"""The same for constants in bfloat16, which has 8 bits: off by at most 2^-8 = 3.9e-3."""


@dataclass(slots=True)
class Match:
    """Where a rule fits: what each parameter is bound to, and the nodes that the pattern covers."""

    bindings: dict[str, Any] = field(default_factory=dict)
    nodes: dict[int, Node] = field(default_factory=dict)
    """id of the pattern's operator → node."""
    roots: tuple[Output, ...] = ()
    """The values of the pattern, as this match has them."""

    @property
    def root(self) -> Node:
        """The node that makes the pattern's first value."""
        return self.nodes[id(self.roots[0].operator)]

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors that a replacement must make, in the order of the pattern's values."""
        return [self.nodes[id(r.operator)].outputs[r.index] for r in self.roots]


@dataclass
class Failure:
    """The first thing that stopped the attempt that got furthest."""

    depth: int = -1
    reason: Callable[[], str] = str

    def note(self, depth: int, reason: Callable[[], str]) -> None:
        if depth > self.depth:
            self.depth, self.reason = depth, reason


class Matcher:
    """Tries one rule at nodes of one scope (a graph, or a subgraph)."""

    def __init__(self, rule: Rewrite, nodes: Container[int], outputs: Container[int], opset: int) -> None:
        """`nodes` and `outputs` are the ids of the scope's nodes and of its output tensors."""
        self.rule, self.nodes, self.outputs = rule, nodes, outputs
        self.defaults = {id(o): _defaults(o.op, o.domain, opset) for o in rule.operators}
        self.failure = Failure()

    def at(self, node: Node) -> Match | None:
        """The match whose first root is `node`; None, with the reason in `failure`."""
        self.failure = Failure()
        for match in self._roots(node):
            problem = self._escape(match) or self._widened(match) or self._refusal(match)
            if problem is None:
                return self._without_shared_shapes(match)
            self.failure.note(1 << 20, lambda problem=problem: problem)  # type: ignore[misc]
        return None

    def _roots(self, node: Node) -> Iterator[Match]:
        for roots in self.rule.roots:
            for match in self._operator(roots[0].operator, node, Match()):
                for whole in self._others(roots[1:], match):
                    yield Match(whole.bindings, whole.nodes, roots)

    def _others(self, roots: Sequence[Output], match: Match) -> Iterator[Match]:
        """Matches that cover the further values of the pattern too: each reads something that is bound already."""
        if not roots:
            yield match
        elif id(roots[0].operator) in match.nodes:
            yield from self._others(roots[1:], match)
        else:
            operator = roots[0].operator
            shared = next((t for t in (_bound(value, match) for value in operator.inputs) if t is not None), None)
            for user in _distinct(shared.outputs if shared is not None else []):
                for wider in self._operator(operator, user, match):
                    yield from self._others(roots[1:], wider)

    def _refusal(self, match: Match) -> str | None:
        reason: str | None = self.call(self.rule.check, match)
        return reason

    def call(self, method: Callable[..., Any], match: Match, *before: Any) -> Any:
        """Call `check` or `replace` with those of the pattern's parameters that it names; with all, if it takes any."""
        bound = {}
        for parameter in self.rule.parameters:
            value: Any = match.bindings.get(parameter.name)
            single = parameter.kind is Scalar and value is not None
            bound[parameter.name] = float(value.reshape(-1)[0]) if single else value
        wanted = _parameters(method)[len(before) :]
        if any(p.kind is p.VAR_POSITIONAL for p in wanted):
            return method(*before, *bound.values())
        return method(*before, **{p.name: bound[p.name] for p in wanted})

    def _escape(self, match: Match) -> str | None:
        inside = {id(node) for node in match.nodes.values()}
        roots = {id(t) for t in match.outputs}
        for node in match.nodes.values():
            if id(node) not in self.nodes:
                return f"{called(node)} stands in another graph than what it belongs to"
            for tensor in node.outputs:
                if id(tensor) in roots:
                    continue
                if id(tensor) in self.outputs:
                    return f"'{tensor.name}', inside the pattern, is an output of the graph"
                user = next((n for n in tensor.outputs if id(n) not in inside), None)
                if user is not None and node.op != "Shape":
                    return f"'{tensor.name}', inside the pattern, is also used by {called(user)}"
        return None

    def _widened(self, match: Match) -> str | None:
        """A constant of one element may have more axes than what it meets ([1, 1, 1] and [4]): they would be lost."""
        for node in match.nodes.values():
            for tensor in node.inputs if node.op in BROADCASTING else ():
                source = constant_source(tensor)
                if source is None or prod(source.shape) != 1:
                    continue
                known = [len(t.shape) for t in node.inputs if t is not tensor and t.shape is not None]
                if len(source.shape) > max(known, default=1):
                    shape = list(source.shape)
                    return f"'{tensor.name}' has shape {shape}, and may add axes to what {called(node)} makes"
        return None

    def _without_shared_shapes(self, match: Match) -> Match:
        """A Shape inside the pattern that others read too costs nothing: it stays for them."""
        inside = {id(node) for node in match.nodes.values()}
        nodes = {
            key: node
            for key, node in match.nodes.items()
            if node.op != "Shape" or all(id(user) in inside for user in node.outputs[0].outputs)
        }
        return Match(match.bindings, nodes, match.roots)

    def _value(self, value: Value | None, tensor: Tensor | None, match: Match, depth: int) -> Iterator[Match]:
        """Every way in which `tensor` can be `value`, given what `match` has bound."""
        if isinstance(value, Either):
            missing = tensor is None or tensor.is_empty()
            optional = any(option is None for option in value.options)
            for option in value.options:
                if not optional or (option is None) == missing:
                    yield from self._value(option, tensor, match, depth)
        elif value is None or tensor is None or tensor.is_empty():
            if value is None and (tensor is None or tensor.is_empty()):
                yield match
            else:
                self.failure.note(depth, lambda: "an optional input is there that must not be, or is missing")
        elif isinstance(value, Parameter):
            yield from self._parameter(value, tensor, match, depth)
        elif isinstance(value, Output):
            producer = tensor.inputs[0] if tensor.inputs else None
            if producer is None or not _is(producer, value.operator):
                source = f"comes from {called(producer)}" if producer is not None else f"is {_origin(tensor)}"
                self.failure.note(depth, lambda: f"'{tensor.name}' {source}, where {value.operator.op} is needed")
            elif position(producer, tensor) == value.index:
                yield from self._operator(value.operator, producer, match, depth)
        else:
            yield from self._number(value, tensor, match, depth)

    def _parameter(self, parameter: Parameter, tensor: Tensor, match: Match, depth: int) -> Iterator[Match]:
        bound = match.bindings.get(parameter.name)
        if parameter.kind is Scalar:
            value = _single(tensor)
            if value is None:
                self.failure.note(
                    depth, lambda: f"'{tensor.name}' is {_kind(tensor)}, where a constant number is needed"
                )
            elif bound is None or np.array_equal(bound, value):
                yield Match({**match.bindings, parameter.name: value}, match.nodes)
        elif parameter.kind is Weight and constant_source(tensor) is None:
            self.failure.note(depth, lambda: f"'{tensor.name}' is not a constant")
        elif bound is None:
            yield Match({**match.bindings, parameter.name: tensor}, match.nodes)
        elif bound is tensor:
            yield match
        else:
            self.failure.note(
                depth, lambda: f"'{tensor.name}' stands where '{bound.name}' must stand again ({parameter.name})"
            )

    def _number(self, number: float, tensor: Tensor, match: Match, depth: int) -> Iterator[Match]:
        source, value = constant_source(tensor), _single(tensor)
        if source is None or value is None:
            self.failure.note(depth, lambda: f"'{tensor.name}' is {_kind(tensor)}, where {number:.6g} is needed")
            return
        found = float(value.reshape(-1)[0])
        rounded = onnx_dtype(source) == onnx.TensorProto.BFLOAT16
        if abs(found - number) <= (BFLOAT16_TOLERANCE if rounded else RELATIVE_TOLERANCE) * abs(number):
            yield match
        else:
            self.failure.note(depth, lambda: f"'{tensor.name}' is {found:.6g}, {self.rule.name} needs {number:.6g}")

    def _operator(self, pattern: Operator, node: Node, match: Match, depth: int = 0) -> Iterator[Match]:
        bound = match.nodes.get(id(pattern))
        if bound is not None:
            if bound is node:
                yield match
            else:
                self.failure.note(depth, lambda: f"{called(node)} stands where {called(bound)} must stand again")
            return
        if not _is(node, pattern):
            self.failure.note(depth, lambda: f"{called(node)} stands where {pattern.op} is needed")
            return
        attributes = self._attributes(pattern, node, match.bindings, depth)
        if attributes is None:
            return
        inputs = _data_inputs(pattern, node)
        deeper = Match(attributes, {**match.nodes, id(pattern): node})
        if pattern.inputs and isinstance(pattern.inputs[-1], Parameter) and pattern.inputs[-1].kind is Rest:
            yield from self._inputs(pattern.inputs, inputs, deeper, len(deeper.nodes))
            return
        width = max(len(inputs), len(pattern.inputs))
        wanted = [*pattern.inputs, *[None] * (width - len(pattern.inputs))]
        given = [*inputs, *[None] * (width - len(inputs))]
        orders = [given]
        if pattern.op in COMMUTATIVE and width == 2:
            orders.append(given[::-1])
        for order in orders:
            yield from self._inputs(wanted, order, deeper, len(deeper.nodes))

    def _inputs(
        self, wanted: Sequence[Value | None], given: Sequence[Tensor | None], match: Match, depth: int
    ) -> Iterator[Match]:
        if not wanted:
            yield match
            return
        if isinstance(wanted[0], Parameter) and wanted[0].kind is Rest:
            yield Match({**match.bindings, wanted[0].name: list(given)}, match.nodes)
            return
        for partial in self._value(wanted[0], given[0], match, depth):
            yield from self._inputs(wanted[1:], given[1:], partial, max(depth, len(partial.nodes)))

    def _attributes(self, pattern: Operator, node: Node, bindings: dict[str, Any], depth: int) -> dict[str, Any] | None:
        """The bindings with this node's attributes, None where one of them is not what the pattern says."""
        if not pattern.attributes and not node.attrs:
            return bindings
        bound = dict(bindings)
        defaults = self.defaults[id(pattern)]
        named = set(pattern.attributes)
        for name, wanted in pattern.attributes.items():
            if isinstance(wanted, Parameter) and wanted.kind is Attributes:
                named.discard(name)
                bound[wanted.name] = {key: value for key, value in node.attrs.items() if key not in named}
        for name in named if len(named) < len(pattern.attributes) else {*named, *node.attrs, *defaults}:
            if name not in pattern.attributes and _says_nothing(node, name):
                continue
            if name in pattern.attributes and _is_computed(node, name):
                self.failure.note(depth, lambda n=name: f"{called(node)} computes its {n}")  # type: ignore[misc]
                return None
            found = attribute(node, name, defaults.get(name))
            wanted = pattern.attributes.get(name, defaults.get(name))
            if isinstance(wanted, Parameter):
                if wanted.name in bound and bound[wanted.name] != found:
                    expected = bound[wanted.name]
                    self.failure.note(
                        depth,
                        lambda n=name, f=found, e=expected: f"{called(node)} has {n} {f}, elsewhere {e}",  # type: ignore[misc]
                    )
                    return None
                bound[wanted.name] = found
            elif found != wanted:
                self.failure.note(
                    depth,
                    lambda n=name, f=found, w=wanted: f"{called(node)} has {n} {f}, {self.rule.name} needs {w}",  # type: ignore[misc]
                )
                return None
        return bound


SINGLE = {"min", "max", "k"}
"""Of the attributes that became inputs, those that are one number; the others are lists, whatever shape they have."""


def attribute(node: Node, name: str, default: object = None) -> Any:
    """An attribute's value, also where newer opsets made it an input; None where that input is no constant."""
    if name in node.attrs:
        return node.attrs[name]
    position, _ = ATTRIBUTE_BECAME_INPUT.get(node.op, {}).get(name, (0, 0))
    if position and len(node.inputs) > position and not node.inputs[position].is_empty():
        value = constant_value(node.inputs[position])
        if value is None:
            return None
        return value.item() if name in SINGLE else value.reshape(-1).tolist()
    return default


def _says_nothing(node: Node, name: str) -> bool:
    """Whether an attribute makes no difference: tf2onnx says of each reduction what is to be done without axes."""
    return name == "noop_with_empty_axes" and bool(attribute(node, "axes"))


def _is_computed(node: Node, name: str) -> bool:
    """Whether what was an attribute once is an input here, and no constant."""
    position, _ = ATTRIBUTE_BECAME_INPUT.get(node.op, {}).get(name, (0, 0))
    if name in node.attrs or not position or len(node.inputs) <= position or node.inputs[position].is_empty():
        return False
    return constant_source(node.inputs[position]) is None


def _data_inputs(pattern: Operator, node: Node) -> list[Tensor]:
    """The node's inputs without those that the pattern names as attributes."""
    became = ATTRIBUTE_BECAME_INPUT.get(node.op, {}) if pattern.attributes else {}
    named = {became[name][0] for name in pattern.attributes if name in became}
    inputs = [t for i, t in enumerate(node.inputs) if i not in named] if named else list(node.inputs)
    while inputs and inputs[-1].is_empty():
        inputs.pop()
    return inputs


@cache
def _parameters(method: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(method).parameters.values())


@cache
def _defaults(op: str, domain: str, opset: int) -> dict[str, object]:
    try:
        schema = onnx.defs.get_schema(op, max_inclusive_version=opset, domain=domain)
    except onnx.defs.SchemaError:
        return {}
    values = {}
    for name, definition in schema.attributes.items():
        if definition.default_value.name:
            value = onnx.helper.get_attribute_value(definition.default_value)
            values[name] = value.decode() if isinstance(value, bytes) else value
    return values


def position(node: Node, tensor: Tensor) -> int:
    return next(i for i, t in enumerate(node.outputs) if t is tensor)


def called(node: Node) -> str:
    return f"{node.op} '{node.name or node.outputs[0].name}'"


def _origin(tensor: Tensor) -> str:
    return "a constant" if isinstance(tensor, Constant) else "an input of the graph"


def _kind(tensor: Tensor) -> str:
    source = constant_source(tensor)
    return "not a constant" if source is None else f"a constant of shape {list(source.shape)}"


def _single(tensor: Tensor) -> Array | None:
    """The value of a constant with one element, as float64; None for any other tensor. Loads nothing larger."""
    source = constant_source(tensor)
    if source is None or prod(source.shape) != 1:
        return None
    value = constant_value(tensor)
    return None if value is None or value.dtype.kind not in "fiuV" else value.astype(np.float64)


def _is(node: Node, pattern: Operator) -> bool:
    domain = node.domain if node.domain not in (None, "ai.onnx") else ""
    return operator_of(node) == pattern.op and domain == pattern.domain


def operator_of(node: Node) -> str:
    """The operator that a node is to a pattern: a Sum of two tensors is an Add."""
    return "Add" if node.op == "Sum" and len(node.inputs) == 2 else str(node.op)


def _bound(value: Value | None, match: Match) -> Tensor | None:
    """The tensor that `value` is in this match, where it is known."""
    if isinstance(value, Parameter):
        found = match.bindings.get(value.name)
        return found if isinstance(found, Tensor) else None
    if isinstance(value, Output) and id(value.operator) in match.nodes:
        return match.nodes[id(value.operator)].outputs[value.index]
    return None


def _distinct(nodes: Sequence[Node]) -> list[Node]:
    return list({id(node): node for node in nodes}.values())
