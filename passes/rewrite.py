"""The pattern language: a rule is two functions that call operators, one for what stands there, one for what shall.

    class GeluFromErf(Rewrite):
        opset = 20

        def pattern(self, op, x):
            half = op.Mul(x, op.Add(op.Erf(op.either(op.Div(x, 2**0.5), op.Mul(x, 0.5**0.5))), 1.0))
            return op.Mul(half, 0.5)

        def replace(self, op, x):
            return op.Gelu(x, approximate="none")

The parameters after `op` are what the pattern binds, by annotation: none, any tensor; `Weight`, a constant of any
shape; `Scalar`, a constant with one element, handed on as a float; `Attribute`, an attribute's value. A parameter
used twice must be the same tensor twice. Numbers are constants that match by value. Attributes that a pattern does
not name must have the operator's default. Inputs of commutative operators match in any order. Tensors inside the
pattern that are graph outputs, or that anything outside it uses, stop the match: a rewrite never recomputes.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import onnx

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Tensor,
    Variable,
    constant_value,
    fresh_names,
    infer_shapes,
    metadata,
    module_of,
    scopes,
    unlink,
)
from llmc.passes.opset import raise_opset

COMMUTATIVE = {"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum"}
RELATIVE_TOLERANCE = 1e-3
"""Constants match within this: FP16 has 11 bits, so a rounded constant is off by at most 2^-11 = 4.9e-4."""
ATTRIBUTE_BECAME_INPUT: dict[str, dict[str, tuple[int, int]]] = {
    **{f"Reduce{kind}": {"axes": (1, 18)} for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod")},
    "ReduceSum": {"axes": (1, 13)},
    "ReduceSumSquare": {"axes": (1, 18)},
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


# What a pattern is made of


@dataclass(frozen=True, eq=False)
class Parameter:
    name: str
    kind: type | None


@dataclass(frozen=True, eq=False)
class Operator:
    op: str
    inputs: tuple[Value | None, ...]
    attributes: dict[str, object]
    outputs: int


@dataclass(frozen=True, eq=False)
class Output:
    operator: Operator
    index: int


@dataclass(frozen=True, eq=False)
class Either:
    options: tuple[Value, ...]


Value = Parameter | Output | Either | float | int


class Tracer:
    """`op` while a pattern is read: every call makes a piece of the pattern."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*inputs: Value | None, outputs: int = 1, **attributes: object) -> Any:
            made = Operator(name, inputs, attributes, outputs)
            values = tuple(Output(made, i) for i in range(outputs))
            return values[0] if outputs == 1 else values

        return call

    def either(self, *options: Value) -> Value:
        return Either(options)


class Builder:
    """`op` while nodes are made: in a replacement, or in an example that is built from a pattern.

    Numbers become constants of the type of the first tensor input. `choose` says which option of each `either` to
    take, in the order of the calls (examples only).
    """

    def __init__(
        self, opset: int, fresh: Callable[[str], str], scope: str, choose: Sequence[int] | None = None
    ) -> None:
        self._opset, self._fresh, self._scope = opset, fresh, scope
        self._choices = iter(choose) if choose is not None else None
        self.nodes: list[Node] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*inputs: Tensor | Array | float | None, outputs: int = 1, **attributes: Any) -> Any:
            like = next((i.dtype for i in inputs if isinstance(i, Tensor) and i.dtype is not None), np.float32)
            given = [self._tensor(i, like) for i in inputs]
            kept: dict[str, Any] = {}
            for key, value in attributes.items():
                position, since = ATTRIBUTE_BECAME_INPUT.get(name, {}).get(key, (0, 1 << 30))
                if self._opset < since:
                    kept[key] = value
                    continue
                given.extend(Variable.empty() for _ in range(position + 1 - len(given)))
                given[position] = self._tensor(np.asarray(value), np.int64)
            node_name = self._fresh(f"{self._scope}.{name}" if self._scope else name)
            made = [Variable(self._fresh(f"{node_name}_out"), dtype=like) for _ in range(outputs)]
            self.nodes.append(Node(name, node_name, attrs=kept, inputs=given, outputs=made))
            return made[0] if outputs == 1 else tuple(made)

        return call

    def either(self, *options: Any) -> Any:
        if self._choices is None:
            raise TypeError("`either` belongs into patterns: a replacement is one thing")
        return options[next(self._choices)]

    def _tensor(self, value: Tensor | Array | float | None, like: Any) -> Tensor:
        if value is None:
            return Variable.empty()
        if isinstance(value, Tensor):
            return value
        array = value if isinstance(value, np.ndarray) else np.asarray(value, dtype=like)
        return Constant(self._fresh(f"{self._scope}.constant" if self._scope else "constant"), array)


# Rules


class Rewrite(ABC):
    """One rule. `opset` is the lowest that has every operator of `replace`."""

    opset: ClassVar[int] = 1

    @abstractmethod
    def pattern(self, op: Any, *parameters: Any) -> Any:
        """What stands there: the value (or tuple of values) that the pattern makes."""

    @abstractmethod
    def replace(self, op: Any, *parameters: Any) -> Any:
        """What shall stand there: as many values as the pattern makes."""

    def check(self, *parameters: Any) -> str | None:
        """Why this match must be left alone, or None. Gets what `replace` gets."""
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
        kinds = {"Weight": Weight, "Scalar": Scalar, "Attribute": Attribute}
        signature = list(inspect.signature(self.pattern).parameters.values())[1:]
        return tuple(Parameter(p.name, kinds.get(str(p.annotation).rpartition(".")[2])) for p in signature)

    @cached_property
    def values(self) -> tuple[Value, ...]:
        """The values that the pattern makes."""
        made = self.pattern(Tracer(), *self.parameters)
        return made if isinstance(made, tuple) else (made,)

    @cached_property
    def roots(self) -> tuple[tuple[Output, ...], ...]:
        """The pattern's values, once for each option where the first is an `either`."""
        return tuple((first, *self.values[1:]) for first in _options(self.values[0]))  # type: ignore[misc]

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

        Where it stands unmatched, the user hears why.
        """
        needed = list(_required(self.values[0]).values())
        kinds = [o.op for o in needed]
        return min(needed, key=lambda o: (kinds.count(o.op), _COMMON.index(o.op) if o.op in _COMMON else -1))

    @cached_property
    def alternatives(self) -> tuple[tuple[int, ...], ...]:
        """Every way to choose among the pattern's `either` calls."""
        arities: list[int] = []

        class Count(Tracer):
            def either(self, *options: Value) -> Value:
                arities.append(len(options))
                return super().either(*options)

        self.pattern(Count(), *self.parameters)
        return tuple(itertools.product(*map(range, arities)))


_COMMON = ("ReduceMean", "Sqrt", "Sub", "Div", "Softmax", "Transpose", "Reshape", "MatMul", "Cast", "Mul", "Add")


def _options(value: Value) -> Iterator[Output]:
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


# Matching


@dataclass
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

    def __init__(self, rule: Rewrite, scope: Graph, opset: int) -> None:
        self.rule = rule
        self.defaults = {o.op: _defaults(o.op, opset) for o in rule.operators}
        self.outputs = {id(t) for t in scope.outputs}
        self.failure = Failure()

    def at(self, node: Node) -> Match | None:
        """The match whose first root is `node`; None, with the reason in `failure`."""
        self.failure = Failure()
        for match in self._roots(node):
            problem = self._escape(match) or self._refusal(match)
            if problem is None:
                return match
            self.failure.note(1 << 20, lambda problem=problem: problem)  # type: ignore[misc]
        return None

    def _roots(self, node: Node) -> Iterator[Match]:
        for roots in self.rule.roots:
            for match in self._operator(roots[0].operator, node, Match()):
                if all(id(other.operator) in match.nodes for other in roots):
                    yield Match(match.bindings, match.nodes, roots)

    def _refusal(self, match: Match) -> str | None:
        return self.rule.check(*self.arguments(match))

    def arguments(self, match: Match) -> list[Any]:
        """What `check` and `replace` get for the pattern's parameters."""
        given = []
        for parameter in self.rule.parameters:
            value = match.bindings.get(parameter.name)
            given.append(float(value.reshape(-1)[0]) if parameter.kind is Scalar and value is not None else value)
        return given

    def _escape(self, match: Match) -> str | None:
        inside = {id(node) for node in match.nodes.values()}
        roots = {id(t) for t in match.outputs}
        for node in match.nodes.values():
            for tensor in node.outputs:
                if id(tensor) in roots:
                    continue
                if id(tensor) in self.outputs:
                    return f"'{tensor.name}', inside the pattern, is an output of the graph"
                user = next((n for n in tensor.outputs if id(n) not in inside), None)
                if user is not None:
                    return f"'{tensor.name}', inside the pattern, is also used by {_called(user)}"
        return None

    def _value(self, value: Value | None, tensor: Tensor | None, match: Match, depth: int) -> Iterator[Match]:
        """Every way in which `tensor` can be `value`, given what `match` has bound."""
        if isinstance(value, Either):
            for option in value.options:
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
            if producer is None or producer.op != value.operator.op or producer.domain not in (None, "", "ai.onnx"):
                source = f"comes from {_called(producer)}" if producer is not None else f"is {_origin(tensor)}"
                self.failure.note(depth, lambda: f"'{tensor.name}' {source}, where {value.operator.op} is needed")
            elif _position(producer, tensor) == value.index:
                yield from self._operator(value.operator, producer, match, depth)
        else:
            yield from self._number(value, tensor, match, depth)

    def _parameter(self, parameter: Parameter, tensor: Tensor, match: Match, depth: int) -> Iterator[Match]:
        bound = match.bindings.get(parameter.name)
        if parameter.kind is Scalar:
            value = constant_value(tensor)
            if value is None or value.size != 1:
                what = "not a constant" if value is None else f"a constant of shape {list(value.shape)}"
                self.failure.note(depth, lambda: f"'{tensor.name}' is {what}, where a constant number is needed")
            elif bound is None or np.array_equal(bound, value):
                yield Match({**match.bindings, parameter.name: value}, match.nodes)
        elif parameter.kind is Weight and not isinstance(tensor, Constant):
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
        value = constant_value(tensor)
        if value is None or value.size != 1 or value.dtype.kind not in "fiuV":
            what = "not a constant" if value is None else f"a constant of shape {list(value.shape)}"
            self.failure.note(depth, lambda: f"'{tensor.name}' is {what}, where {number:.6g} is needed")
            return
        found = float(value.reshape(-1)[0])
        if abs(found - number) <= RELATIVE_TOLERANCE * abs(number):
            yield match
        else:
            self.failure.note(depth, lambda: f"'{tensor.name}' is {found:.6g}, {self.rule.name} needs {number:.6g}")

    def _operator(self, pattern: Operator, node: Node, match: Match, depth: int = 0) -> Iterator[Match]:
        bound = match.nodes.get(id(pattern))
        if bound is not None:
            if bound is node:
                yield match
            else:
                self.failure.note(depth, lambda: f"{_called(node)} stands where {_called(bound)} must stand again")
            return
        if node.op != pattern.op or node.domain not in (None, "", "ai.onnx"):
            self.failure.note(depth, lambda: f"{_called(node)} stands where {pattern.op} is needed")
            return
        attributes = self._attributes(pattern, node, match.bindings, depth)
        if attributes is None:
            return
        inputs = _data_inputs(pattern, node)
        deeper = Match(attributes, {**match.nodes, id(pattern): node})
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
        for partial in self._value(wanted[0], given[0], match, depth):
            yield from self._inputs(wanted[1:], given[1:], partial, max(depth, len(partial.nodes)))

    def _attributes(
        self, pattern: Operator, node: Node, bindings: dict[str, Any], depth: int
    ) -> dict[str, Any] | None:
        """The bindings with this node's attributes, None where one of them is not what the pattern says."""
        bound = dict(bindings)
        defaults = self.defaults[pattern.op]
        for name in {*pattern.attributes, *node.attrs, *defaults}:
            found = attribute(node, name, defaults.get(name))
            wanted = pattern.attributes.get(name, defaults.get(name))
            if isinstance(wanted, Parameter):
                if wanted.name in bound and bound[wanted.name] != found:
                    expected = bound[wanted.name]
                    self.failure.note(
                        depth, lambda n=name, f=found, e=expected: f"{_called(node)} has {n} {f}, elsewhere {e}"  # type: ignore[misc]
                    )
                    return None
                bound[wanted.name] = found
            elif found != wanted:
                self.failure.note(
                    depth,
                    lambda n=name, f=found, w=wanted: f"{_called(node)} has {n} {f}, {self.rule.name} needs {w}",  # type: ignore[misc]
                )
                return None
        return bound


def attribute(node: Node, name: str, default: object = None) -> Any:
    """An attribute's value, also where newer opsets made it an input; None where that input is no constant."""
    if name in node.attrs:
        return node.attrs[name]
    position, _ = ATTRIBUTE_BECAME_INPUT.get(node.op, {}).get(name, (0, 0))
    if position and len(node.inputs) > position and not node.inputs[position].is_empty():
        value = constant_value(node.inputs[position])
        return None if value is None else value.tolist()
    return default


def _data_inputs(pattern: Operator, node: Node) -> list[Tensor]:
    """The node's inputs without those that the pattern names as attributes."""
    named = {ATTRIBUTE_BECAME_INPUT.get(node.op, {}).get(name, (0, 0))[0] for name in pattern.attributes} - {0}
    inputs = [t for i, t in enumerate(node.inputs) if i not in named]
    while inputs and inputs[-1].is_empty():
        inputs.pop()
    return inputs


def _defaults(op: str, opset: int) -> dict[str, object]:
    try:
        schema = onnx.defs.get_schema(op, max_inclusive_version=opset)
    except onnx.defs.SchemaError:
        return {}
    values = {}
    for name, definition in schema.attributes.items():
        if definition.default_value.name:
            value = onnx.helper.get_attribute_value(definition.default_value)
            values[name] = value.decode() if isinstance(value, bytes) else value
    return values


def _position(node: Node, tensor: Tensor) -> int:
    return next(i for i, t in enumerate(node.outputs) if t is tensor)


def _called(node: Node) -> str:
    return f"{node.op} '{node.name or node.outputs[0].name}'"


def _origin(tensor: Tensor) -> str:
    return "a constant" if isinstance(tensor, Constant) else "an input of the graph"


# Applying


class RewritePass(Pass):
    """A pass that is a list of rules, tried in order."""

    rules: ClassVar[tuple[Rewrite, ...]]

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        for rule in self.rules:
            apply_rule(rule, graph, context, result)
        _drop_explained(result)
        return result


def apply_rule(rule: Rewrite, graph: Graph, context: Context, result: PassResult) -> None:
    """Apply one rule wherever it fits, in the graph and its subgraphs; refusals go to the near misses."""
    infer_shapes(graph)
    if graph.opset < rule.opset and any(_matches(rule, graph, scope, []) for scope in scopes(graph)):
        problem = raise_opset(graph, rule.opset)
        if problem is not None:
            result.near_misses.append(NearMiss(rule.name, "", problem))
            return
        infer_shapes(graph)
    for scope in scopes(graph):
        _apply_in_scope(rule, graph, scope, context, result)


def _matches(rule: Rewrite, graph: Graph, scope: Graph, misses: list[tuple[Node, str]]) -> list[Match]:
    """Matches that do not overlap, in graph order; `misses` gets each heart of the pattern that found no match."""
    matcher = Matcher(rule, scope, graph.opset)
    found: list[Match] = []
    covered: set[int] = set()
    operators = {roots[0].operator.op for roots in rule.roots}
    for node in scope.nodes:
        if node.op not in operators:
            continue
        match = matcher.at(node)
        if match is not None and covered.isdisjoint(id(n) for n in match.nodes.values()):
            covered.update(id(n) for n in match.nodes.values())
            found.append(match)
    path = _path(rule)
    for node in scope.nodes:
        if node.op == rule.heart.op and id(node) not in covered:
            misses.append((node, _why_not(matcher, node, path)))
    return found


def _path(rule: Rewrite) -> list[Operator]:
    """Operators from the heart's user up to the root."""

    def users(value: Value | None, above: list[Operator]) -> Iterator[list[Operator]]:
        if isinstance(value, Either):
            for option in value.options:
                yield from users(option, above)
        elif isinstance(value, Output):
            if value.operator is rule.heart:
                yield above
            for source in value.operator.inputs:
                yield from users(source, [value.operator, *above])

    return next(path for value in rule.values for path in users(value, []))


def _why_not(matcher: Matcher, heart: Node, path: list[Operator]) -> str:
    """Walk from the heart to where the root would be; the first step that is missing, or what stops a match there."""
    node = heart
    for step in path:
        users = [user for tensor in node.outputs for user in tensor.outputs]
        onward = next((user for user in users if user.op == step.op), None)
        if onward is None:
            goes = f"goes to {_called(users[0])}" if users else "goes nowhere"
            return f"the result of {_called(node)} {goes}, where {step.op} is needed"
        node = onward
    return "another match covers it" if matcher.at(node) is not None else matcher.failure.reason()


def _apply_in_scope(rule: Rewrite, graph: Graph, scope: Graph, context: Context, result: PassResult) -> None:
    misses: list[tuple[Node, str]] = []
    matcher = Matcher(rule, scope, graph.opset)
    fresh = fresh_names(graph)
    placed: dict[int, list[Node]] = {}
    removed: set[int] = set()
    for match in _matches(rule, graph, scope, misses):
        if not context.apply(result, rule.name, match.root):
            break
        placed[id(match.root)] = _replace(matcher, match, graph.opset, fresh)
        removed.update(id(n) for n in match.nodes.values())
    result.near_misses.extend(NearMiss(rule.name, n.name, reason, module_of(n)) for n, reason in misses)
    if removed:
        scope.nodes = [
            new for old in scope.nodes for new in placed.get(id(old), [] if id(old) in removed else [old])
        ]


def _replace(matcher: Matcher, match: Match, opset: int, fresh: Callable[[str], str]) -> list[Node]:
    """Make the replacement; it takes over the tensors (and so the names) of what the pattern made."""
    root, roots, old = match.root, match.outputs, list(match.nodes.values())
    builder = Builder(opset, fresh, root.name)
    made = matcher.rule.replace(builder, *matcher.arguments(match))
    merged = _merged_metadata(root, old)
    for node in old:
        unlink(node)
    for tensor, new in zip(roots, made if isinstance(made, tuple) else (made,), strict=True):
        producer = new.inputs[0]
        position = _position(producer, new)
        producer.outputs[position] = tensor
        for user in list(new.outputs):
            user.inputs[_input_position(user, new)] = tensor
    for node in builder.nodes:
        metadata(node).update(merged)
    return builder.nodes


def _input_position(node: Node, tensor: Tensor) -> int:
    return next(i for i, t in enumerate(node.inputs) if t is tensor)


def _merged_metadata(root: Node, nodes: Sequence[Node]) -> dict[str, str]:
    """The root's metadata, with its module scopes cut to what all nodes share."""
    merged = dict(metadata(root))
    key = "pkg.torch.onnx.name_scopes"
    scopes = [ast.literal_eval(metadata(n)[key]) for n in nodes if key in metadata(n)]
    if scopes:
        shared = [level[0] for level in zip(*scopes, strict=False) if len(set(level)) == 1]
        leaf = ast.literal_eval(merged[key])[-1] if key in merged else ""
        merged[key] = repr(shared if shared and shared[-1] == leaf else [*shared, leaf])
    return merged


def _drop_explained(result: PassResult) -> None:
    """A place that one rule left alone and another took is no near miss; nor is a place named twice by one reason."""
    gone = {a.node for a in result.rewrites}
    seen: set[tuple[str, str]] = set()
    kept = []
    for miss in result.near_misses:
        if miss.node not in gone and (miss.node, miss.reason) not in seen:
            seen.add((miss.node, miss.reason))
            kept.append(miss)
    result.near_misses[:] = kept
