"""Which nodes a precision pass takes: one language of patterns for every `include`, `exclude` and `keep`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import AfterValidator, Field

from llmc.passes.base import LlmcError, Pass
from llmc.passes.graph import Node, module_of

REGULAR = "re:"
FIRST, LAST = "first", "last"
LANGUAGE = (
    "names, module paths or operators, with * and ?; 're:' and a regular expression, found anywhere in a name or "
    "module path; 'first' and 'last' layer"
)


def _readable(pattern: str) -> str:
    if pattern.startswith(REGULAR):
        try:
            re.compile(pattern.removeprefix(REGULAR))
        except re.error as error:
            raise ValueError(f"'{pattern}' is no regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_readable)]
"""One of `LANGUAGE`; a regular expression that cannot be read is a fault of the recipe."""


class SelectivePass(Pass):
    """A pass that takes those of its nodes that the recipe includes, and does not exclude."""

    include: list[Pattern] = Field(["*"], description=f"Take these nodes only: {LANGUAGE}.")
    exclude: list[Pattern] = Field([], description="Leave these nodes alone; patterns as for `include`.")

    def refusals(self, nodes: Sequence[Node], others: Sequence[Node] = ()) -> dict[int, str]:
        """id of each of `nodes`, all that the pass could take, that the recipe does not let it take → why not.

        `others` can be named too, but are no layers: neither the first nor the last. Raises LlmcError for a pattern
        that names none of them.
        """
        included = named(nodes, self.include, f"{self.key()}: include", others)
        excluded = named(nodes, self.exclude, f"{self.key()}: exclude", others)
        return {id(node): "no pattern includes it" for node in (*nodes, *others) if id(node) not in included} | {
            key: f"excluded by '{pattern}'" for key, pattern in excluded.items()
        }


def named(nodes: Sequence[Node], patterns: Iterable[str], where: str, others: Sequence[Node] = ()) -> dict[int, str]:
    """id of each of `nodes` (layers, in graph order) and `others` that a pattern names → the first pattern that does.

    Raises LlmcError for a pattern that names none of them ('*' may); the message begins with `where`.
    """
    found: dict[int, str] = {}
    for pattern in patterns:
        matches = _matcher(pattern, nodes)
        matched = [node for node in (*nodes, *others) if matches(node)]
        if not matched and pattern != "*":
            near = _nearest(pattern, (*nodes, *others))
            raise LlmcError(f"{where} pattern '{pattern}' matches no node that it could take{near}")
        for node in matched:
            found.setdefault(id(node), pattern)
    return found


def _matcher(pattern: str, nodes: Sequence[Node]) -> Callable[[Node], bool]:
    if pattern in (FIRST, LAST) and nodes:
        wanted = nodes[0 if pattern == FIRST else -1]
        return lambda node: node is wanted
    if pattern.startswith(REGULAR):
        expression = re.compile(pattern.removeprefix(REGULAR))
        return lambda node: any(expression.search(name) for name in (node.name, module_of(node)))
    return lambda node: any(fnmatchcase(name, pattern) for name in (node.name, module_of(node), node.op))


def _nearest(pattern: str, nodes: Iterable[Node]) -> str:
    names = dict.fromkeys(name for node in nodes for name in (node.name, module_of(node), node.op) if name)
    near = difflib.get_close_matches(pattern.removeprefix(REGULAR), names, cutoff=0.4)
    return f"; nearest: {', '.join(repr(name) for name in near)}" if near else ""
