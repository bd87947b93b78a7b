"""Finds every place of a rule in time linear in the nodes: only from the operator that tells its pattern best."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from llmc.passes.graph import Graph, Node, scopes
from llmc.passes.match import Failure, Match, Matcher, called, operator_of
from llmc.passes.pattern import Operator, Rewrite


class Place:
    """The nodes of a graph or subgraph, by operator and in order, as they were when this was made."""

    def __init__(self, scope: Graph) -> None:
        self.scope = scope
        self.order = {id(node): index for index, node in enumerate(scope.nodes)}
        self.outputs = {id(tensor) for tensor in scope.outputs}
        self.nodes: dict[str, list[Node]] = defaultdict(list)
        for node in scope.nodes:
            self.nodes[operator_of(node)].append(node)


class Places:
    """The graph and its subgraphs, outer ones before inner ones."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.renew()

    def renew(self) -> None:
        """Look at the graph again, after a change."""
        self._places = [Place(scope) for scope in scopes(self.graph)]

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def have(self, operator: str) -> bool:
        """Whether there is a node of this operator."""
        return any(operator in place.nodes for place in self._places)


class Search:
    """One rule in one place. It climbs from each heart to where the root of the pattern would be, and matches there."""

    def __init__(self, rule: Rewrite, place: Place, opset: int) -> None:
        self.matcher = Matcher(rule, place.order.keys(), place.outputs, opset)
        self.hearts = {id(heart): (heart, *_climb(heart, rule.paths)) for heart in place.nodes.get(rule.heart.op, ())}
        self.order = place.order
        self.failures: dict[int, Failure] = {}

    def matches(self) -> list[Match]:
        """Matches that do not overlap, in graph order."""
        found: list[Match] = []
        covered: set[int] = set()
        roots = {id(root): root for _, roots, _ in self.hearts.values() for root in roots}
        for root in sorted(roots.values(), key=lambda node: self.order.get(id(node), len(self.order))):
            match = self.matcher.at(root)
            if match is None:
                self.failures[id(root)] = self.matcher.failure
            elif covered.isdisjoint(id(n) for n in match.nodes.values()):
                covered.update(id(n) for n in match.nodes.values())
                found.append(match)
        return found

    def misses(self, matches: Sequence[Match]) -> Iterator[tuple[Node, str]]:
        """Each heart of the pattern that none of the matches covers, and the first thing that stopped it."""
        covered = {id(node) for match in matches for node in match.nodes.values()}
        for heart, roots, reason in self.hearts.values():
            if id(heart) in covered:
                continue
            if roots:
                failure = self.failures.get(id(roots[0]))
                reason = failure.reason() if failure is not None else "another match covers it"
            yield heart, reason


def _climb(heart: Node, paths: Sequence[Sequence[Operator]]) -> tuple[list[Node], str]:
    """Nodes where the root may be; where there are none, the first step that is missing on the way that led furthest.

    A path is the operators from the heart's user up to the root.
    """
    found: dict[int, Node] = {}
    furthest, reason = -1, ""
    for path in paths:
        level = [heart]
        for depth, step in enumerate(path):
            users = [user for node in level for tensor in node.outputs for user in tensor.outputs]
            onward = {id(user): user for user in users if operator_of(user) == step.op}
            if not onward:
                if depth > furthest:
                    goes = f"goes to {called(users[0])}" if users else "goes nowhere"
                    furthest, reason = depth, f"the result of {called(level[0])} {goes}, where {step.op} is needed"
                break
            level = list(onward.values())
        else:
            found.update((id(node), node) for node in level)
    return list(found.values()), reason
