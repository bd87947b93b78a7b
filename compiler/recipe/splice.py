"""`- recipe: NAME` in a list of passes: the passes of another recipe, `without` some, in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmc.compiler.recipe.errors import suggestion
from llmc.compiler.recipe.source import Fault, Place, Source

Passes = Callable[[str], list[Any]]
"""Name of a recipe → its passes as plain values. Raises LlmcError where there is no such recipe."""
WORD = "recipe"
WITHOUT = "without"


def splice(source: Source, passes_of: Passes) -> Source:
    """The document with every `recipe: NAME` among its passes replaced; what comes from it has its line.

    `without: [KEY, …]` beside it leaves out the passes of these keys.
    """
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
            for taken in _taken(item, passes_of, ("passes", len(spliced)), faults):
                lines["passes", len(spliced)] = source.line(("passes", index))
                spliced.append(taken)
    for place, line in source.lines.items():
        if place[:1] != ("passes",) or len(place) == 1:
            lines[place] = line
        elif place[1] in moved:
            lines["passes", moved[int(place[1])], *place[2:]] = line
    return Source(source.label, {**source.value, "passes": spliced}, lines, tuple(faults))


def _is_splice(item: object) -> bool:
    return isinstance(item, Mapping) and WORD in item and set(item) <= {WORD, WITHOUT}


def _taken(item: Mapping[str, Any], passes_of: Passes, place: Place, faults: list[Fault]) -> list[Any]:
    """The passes of the recipe that `item` names, less those that it leaves out."""
    passes, without = passes_of(item[WORD]), item.get(WITHOUT) or []
    keys = [next(iter(taken)) if isinstance(taken, Mapping) else taken for taken in passes]
    if not isinstance(without, list):
        faults.append(Fault(place, "'without' takes a list of passes, as in 'without: [fuse-gelu]'"))
        return passes
    for key in without:
        if key not in keys:
            hint = suggestion(str(key), map(str, keys))
            faults.append(Fault(place, f"recipe '{item[WORD]}' has no pass '{key}'{hint}"))
    return [taken for taken, key in zip(passes, keys, strict=True) if key not in without]
