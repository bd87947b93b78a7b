"""`- recipe: NAME` in a list of passes: the passes of another recipe, in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmc.compiler.recipe.source import Fault, Place, Source

Passes = Callable[[str], list[Any]]
"""Name of a recipe → its passes as plain values. Raises LlmcError where there is no such recipe."""
WORD = "recipe"


def splice(source: Source, passes_of: Passes) -> Source:
    """The document with every `recipe: NAME` among its passes replaced; what comes from it has its line."""
    items = source.value.get("passes") if isinstance(source.value, dict) else None
    if not isinstance(items, list) or not any(map(_is_splice, items)):
        return source
    spliced: list[Any] = []
    moved: dict[int, int] = {}
    lines: dict[Place, int | str] = {}
    faults = list(source.faults)
    for index, item in enumerate(items):
        if not _is_splice(item):
            moved[index] = len(spliced)
            spliced.append(item)
        elif not isinstance(item[WORD], str):
            faults.append(
                Fault(("passes",), "'recipe' takes the name of a recipe that ships with llmc, as in 'recipe: optimize'")
            )
        else:
            for taken in passes_of(item[WORD]):
                lines["passes", len(spliced)] = source.line(("passes", index))
                spliced.append(taken)
    for place, line in source.lines.items():
        if place[:1] != ("passes",) or len(place) == 1:
            lines[place] = line
        elif place[1] in moved:
            lines["passes", moved[int(place[1])], *place[2:]] = line
    return Source(source.label, {**source.value, "passes": spliced}, lines, tuple(faults))


def _is_splice(item: object) -> bool:
    return isinstance(item, Mapping) and set(item) == {WORD}
