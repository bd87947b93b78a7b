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
from collections.abc import Callable, Sequence
from typing import ClassVar

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.graph import (
    Graph,
    Node,
    fresh_names,
    infer_shapes,
    metadata,
    module_of,
    unlink,
)
from llmc.passes.match import Match, Matcher, position
from llmc.passes.opset import raise_opset
from llmc.passes.pattern import Attribute as Attribute
from llmc.passes.pattern import Attributes as Attributes
from llmc.passes.pattern import Builder
from llmc.passes.pattern import Rest as Rest
from llmc.passes.pattern import Rewrite as Rewrite
from llmc.passes.pattern import Scalar as Scalar
from llmc.passes.pattern import Weight as Weight
from llmc.passes.search import Place, Places, Search

NEWEST_OPSET = 25
"""To which rules may raise a graph: TensorRT reads no newer one."""


class RewritePass(Pass):
    """A pass that is a list of rules, tried in order; again and again where one rewrite may make room for another."""

    rules: ClassVar[tuple[Rewrite, ...]]
    repeat: ClassVar[bool] = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        result, places = PassResult(), Places(graph)
        while True:
            before = len(result.rewrites)
            result.near_misses.clear()
            for rule in self.rules:
                if places.have(rule.heart.op):
                    context.infer_shapes(graph)
                    apply_rule(rule, graph, context, result, self.newest_opset(graph), places)
            if not self.repeat or len(result.rewrites) == before:
                break
        _drop_explained(result)
        return result

    def newest_opset(self, graph: Graph) -> int:  # noqa: ARG002 - for passes that look at the graph
        """To which the rules may raise `graph`."""
        return NEWEST_OPSET


def apply_rule(
    rule: Rewrite,
    graph: Graph,
    context: Context,
    result: PassResult,
    newest_opset: int = NEWEST_OPSET,
    places: Places | None = None,
) -> None:
    """Apply one rule wherever it fits, in the graph and its subgraphs; refusals go to the near misses.

    The graph's shapes must have been inferred. It is raised to the opset of the rule, but not above `newest_opset`.
    `places` are those of the graph as it is, and will be again.
    """
    places = places or Places(graph)
    fits = rule.opset <= graph.opset <= rule.newest_opset
    if not fits and any(Search(rule, place, graph.opset).matches() for place in places):
        problem = _bring_to_opset(graph, rule, newest_opset)
        if problem is not None:
            result.near_misses.append(NearMiss(rule.name, "", problem))
            return
        infer_shapes(graph)
        places.renew()
    changed = [_apply_in_place(rule, graph, place, context, result) for place in places]
    if any(changed):
        places.renew()


def _bring_to_opset(graph: Graph, rule: Rewrite, newest_opset: int) -> str | None:
    """Raise a graph so that it can hold what the rule makes; None when it can, else why it cannot."""
    if graph.opset > rule.newest_opset:
        return f"the graph has opset {graph.opset}, and {rule.too_new}"
    if rule.opset > newest_opset:
        return f"it needs opset {rule.opset}, and the graph of opset {graph.opset} is not to be raised"
    return raise_opset(graph, rule.opset)


def _apply_in_place(rule: Rewrite, graph: Graph, place: Place, context: Context, result: PassResult) -> bool:
    """Apply one rule to one graph or subgraph; True where that changed it."""
    search = Search(rule, place, graph.opset)
    matches = search.matches()
    misses = [NearMiss(rule.name, node.name, reason, module_of(node)) for node, reason in search.misses(matches)]
    fresh = fresh_names(graph)
    placed: dict[int, list[Node]] = {}
    removed: set[int] = set()
    for match in matches:
        if not context.apply(result, rule.name, match.root):
            continue
        placed[id(match.root)] = _replace(search.matcher, match, graph.opset, fresh)
        removed.update(id(n) for n in match.nodes.values())
    result.near_misses.extend(misses)
    if removed:
        nodes = place.scope.nodes
        place.scope.nodes = [n for old in nodes for n in placed.get(id(old), () if id(old) in removed else (old,))]
    return bool(removed)


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
