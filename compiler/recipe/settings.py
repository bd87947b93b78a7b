"""Settings from the command line: `passes.quantize-int8.calibration.samples=64`."""

from __future__ import annotations

import copy
from typing import Any

from llmc.compiler.errors import LlmcError
from llmc.compiler.recipe.errors import suggestion
from llmc.compiler.recipe.source import Place, Source, dotted, parse


def parse_setting(setting: str) -> tuple[str, object]:
    """`KEY=VALUE` → the key and the value, read as YAML. Raises LlmcError where it is not of that form."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise LlmcError(f"--set {setting}: should be KEY=VALUE, such as verify.samples=4")
    value = parse(text, f"--set {setting}", numbered=False)
    if value.faults:
        raise value.error(value.faults)
    return key.strip(), value.value


def apply(source: Source, key: str, value: object, option: str) -> Source:
    """The source with the value at a dotted key replaced. Raises LlmcError where the key leads nowhere.

    Whether the key means anything, and the value fits it, is left to the check of the whole recipe.
    """
    document = copy.deepcopy(source.value)
    lines = dict(source.lines)
    container: Any = document
    place: Place = ()
    *sections, last = key.split(".")
    for part in sections:
        for step in _steps(container, place, part, f"{option}: {key}"):
            place = (*place, step)
            if isinstance(container, dict) and container.get(step) is None:
                container[step] = {}
                lines[place] = option
            container = container[step]
    *position, name = _steps(container, place, last, f"{option}: {key}")
    for step in position:
        container = container[step]
    container[name] = value
    place = (*place, *position, name)
    kept = {known: line for known, line in lines.items() if known[: len(place)] != place}
    return Source(source.label, document, {**kept, place: option})


def _steps(container: object, place: Place, part: str, label: str) -> Place:
    """What one part of a dotted key means inside `container`: one step, or for a pass its position and its key."""
    if isinstance(container, dict):
        return (part,)
    if not isinstance(container, list):
        raise LlmcError(f"{label}: '{dotted(place)}' is a single value, nothing stands below it")
    keys = [next(iter(item)) if isinstance(item, dict) else item for item in container]
    if place == ("passes",) and not part.isdecimal():
        positions = [index for index, key in enumerate(keys) if key == part]
        if not positions:
            raise LlmcError(f"{label}: this recipe has no pass '{part}'{suggestion(part, keys)}")
        if len(positions) > 1:
            numbers = " or ".join(f"passes.{index + 1}" for index in positions)
            raise LlmcError(f"{label}: '{part}' stands {len(positions)} times in this recipe: say {numbers}")
        index = positions[0]
    elif part.isdecimal() and 1 <= int(part) <= len(container):
        index = int(part) - 1
    else:
        raise LlmcError(f"{label}: '{dotted(place)}' has {len(container)} items, counted from 1; got '{part}'")
    if place != ("passes",):
        return (index,)
    if isinstance(container[index], str):
        container[index] = {keys[index]: {}}
    return (index, keys[index])
