"""The pattern language: a rule is two functions that call operators, one for what stands there, one for what shall.

    class GeluFromErf(Rewrite):
        opset = 20

        def pattern(self, op, x):
            half = op.Mul(x, op.Add(op.Erf(op.either(op.Div(x, 2**0.5), op.Mul(x, 0.5**0.5))), 1.0))
            return op.Mul(half, 0.5)

        def replace(self, op, x):
            return op.Gelu(x, approximate="none")

The parameters after `op` are what the pattern binds, by annotation: none, any tensor; `Weight`, a constant of any
shape; `Scalar`, a constant with one element, handed on as a float; `Attribute`, an attribute's value; `Attributes`,
a dict of all that a node has beside those; `Rest`, all further inputs. `check` and `replace` get those parameters
that they name. A parameter used twice must be the same tensor twice. Numbers are constants that match by value.
Attributes that a pattern does not name must have the operator's default. Inputs of commutative operators match in
any order; a Sum of two is an Add. Tensors inside the pattern that are graph outputs, or that anything outside it
uses, stop the match: a rewrite never recomputes. Only a Shape may be used outside, and stays.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.graph import (
    Graph,
    Node,
    fresh_names,
    infer_shapes,
    metadata,
    module_of,
    scopes,
    unlink,
)
from llmc.passes.match import Match, Matcher, called, operator_of, position
from llmc.passes.opset import raise_opset
from llmc.passes.pattern import Attribute as Attribute
from llmc.passes.pattern import Attributes as Attributes
from llmc.passes.pattern import Builder, Either, Operator, Output, Value
from llmc.passes.pattern import Rest as Rest
from llmc.passes.pattern import Rewrite as Rewrite
from llmc.passes.pattern import Scalar as Scalar
from llmc.passes.pattern import Weight as Weight

NEWEST_OPSET = 25
"""To which rules may raise a graph: TensorRT reads no newer one."""


class RewritePass(Pass):
    """A pass that is a list of rules, tried in order; again and again where one rewrite may make room for another."""

    rules: ClassVar[tuple[Rewrite, ...]]
    repeat: ClassVar[bool] = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        while True:
            before = len(result.rewrites)
            result.near_misses.clear()
            for rule in self.rules:
                if any(operator_of(node) == rule.heart.op for scope in scopes(graph) for node in scope.nodes):
                    context.infer_shapes(graph)
                    apply_rule(rule, graph, context, result, self.newest_opset())
            if not self.repeat or len(result.rewrites) == before:
                break
        _drop_explained(result)
        return result

    def newest_opset(self) -> int:
        """To which the rules may raise the graph."""
        return NEWEST_OPSET


def apply_rule(
    rule: Rewrite, graph: Graph, context: Context, result: PassResult, newest_opset: int = NEWEST_OPSET
) -> None:
    """Apply one rule wherever it fits, in the graph and its subgraphs; refusals go to the near misses.

    The graph's shapes must have been inferred. It is raised to the opset of the rule, but not above `newest_opset`.
    """
    if graph.opset < rule.opset and any(_matches(rule, graph, scope, []) for scope in scopes(graph)):
        problem: str | None = f"it needs opset {rule.opset}, and the graph of opset {graph.opset} is not to be raised"
        if rule.opset <= newest_opset:
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
        if operator_of(node) not in operators:
            continue
        match = matcher.at(node)
        if match is not None and covered.isdisjoint(id(n) for n in match.nodes.values()):
            covered.update(id(n) for n in match.nodes.values())
            found.append(match)
    paths = _paths(rule)
    hearts = [n for n in scope.nodes if operator_of(n) == rule.heart.op and id(n) not in covered]
    misses.extend((node, _why_not(matcher, node, paths)) for node in hearts)
    return found


def _paths(rule: Rewrite) -> list[list[Operator]]:
    """Operators from the heart's user up to the root, for each way through the pattern's options."""

    def users(value: Value | None, above: list[Operator]) -> Iterator[list[Operator]]:
        if isinstance(value, Either):
            for option in value.options:
                yield from users(option, above)
        elif isinstance(value, Output):
            if value.operator is rule.heart:
                yield above
            for source in value.operator.inputs:
                yield from users(source, [value.operator, *above])

    return [path for value in rule.values for path in users(value, [])]


def _why_not(matcher: Matcher, heart: Node, paths: Sequence[Sequence[Operator]]) -> str:
    """Walk from the heart to where the root would be; the first step that is missing, or what stops a match there.

    Of several ways to go, the one that leads furthest.
    """
    furthest, reason = -1, ""
    for path in paths:
        node = heart
        for depth, step in enumerate(path):
            users = [user for tensor in node.outputs for user in tensor.outputs]
            onward = next((user for user in users if operator_of(user) == step.op), None)
            if onward is None:
                if depth > furthest:
                    goes = f"goes to {called(users[0])}" if users else "goes nowhere"
                    furthest, reason = depth, f"the result of {called(node)} {goes}, where {step.op} is needed"
                break
            node = onward
        else:
            return matcher.refused(node)
    return reason


def _apply_in_scope(rule: Rewrite, graph: Graph, scope: Graph, context: Context, result: PassResult) -> None:
    misses: list[tuple[Node, str]] = []
    matcher = Matcher(rule, scope, graph.opset)
    fresh = fresh_names(graph)
    placed: dict[int, list[Node]] = {}
    removed: set[int] = set()
    for match in _matches(rule, graph, scope, misses):
        if not context.apply(result, rule.name, match.root):
            continue
        placed[id(match.root)] = _replace(matcher, match, graph.opset, fresh)
        removed.update(id(n) for n in match.nodes.values())
    result.near_misses.extend(NearMiss(rule.name, n.name, reason, module_of(n)) for n, reason in misses)
    if removed:
        scope.nodes = [new for old in scope.nodes for new in placed.get(id(old), [] if id(old) in removed else [old])]


def _replace(matcher: Matcher, match: Match, opset: int, fresh: Callable[[str], str]) -> list[Node]:
    """Make the replacement; it takes over the tensors (and so the names) of what the pattern made."""
    root, roots, old = match.root, match.outputs, list(match.nodes.values())
    builder = Builder(opset, fresh, root.name)
    made = matcher.call(matcher.rule.replace, match, builder)
    merged = merged_metadata(root, old)
    for node in old:
        unlink(node)
    for tensor, new in zip(roots, made if isinstance(made, tuple) else (made,), strict=True):
        producer = new.inputs[0]
        producer.outputs[position(producer, new)] = tensor
        for user in list(new.outputs):
            user.inputs[next(i for i, t in enumerate(user.inputs) if t is new)] = tensor
    for node in builder.nodes:
        metadata(node).update(merged)
    return builder.nodes


def merged_metadata(root: Node, nodes: Sequence[Node]) -> dict[str, str]:
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
