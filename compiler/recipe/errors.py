"""What pydantic found wrong with a document, in the words of the person who wrote it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from llmc.compiler.recipe.source import Fault, Place

_KINDS = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "frozen_set_type": "a list",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "path_type": "a path",
    "set_type": "a list",
    "string_type": "text",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_long": "at most {max_length} long",
    "too_short": "at least {min_length} long",
}
SHOWN = 12
"""Of a longer list of known words only the nearest is named."""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' where a known word is near to `word`, '' where none is."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def suggestion(word: str, known: Iterable[str]) -> str:
    """The nearest known word, or else all of them where they are few enough to read."""
    known = sorted(known)
    return nearest(word, known) or (f"; known: {', '.join(known)}" if 0 < len(known) <= SHOWN else "")


def plain_faults(error: ValidationError, model: type[BaseModel], data: object, base: Place) -> list[Fault]:
    """The faults of `data`, which stands at `base` in its document and was not accepted as a `model`."""
    faults = []
    wanted: dict[Place, list[str]] = {}
    for detail in error.errors(include_url=False):
        kind, context = detail["type"], detail.get("ctx", {})
        path, _ = _locate(detail["loc"], data)
        if kind == "missing":
            faults.append(Fault((*base, *path, str(detail["loc"][-1])), "is missing"))
        elif kind == "extra_forbidden":
            known = {name for owner in _models_at(model, path[:-1]) for name in owner.model_fields}
            hint = _home(model, str(path[-1])) or suggestion(str(path[-1]), known)
            faults.append(Fault((*base, *path), f"unknown key{hint}" if known else "unknown key; there are none here"))
        elif expected := _expected(kind, context):
            wanted.setdefault(path, []).append(expected)
        else:
            faults.append(Fault((*base, *path), str(context.get("error", detail["msg"]))))
    for path, choices in wanted.items():
        _, value = _locate(path, data)
        message = f"should be {' or '.join(dict.fromkeys(choices))}, got {_shown(value)}"
        words = re.findall("'(.*?)'", " ".join(choices))
        faults.append(Fault((*base, *path), message + (nearest(value, words) if isinstance(value, str) else "")))
    return faults


def _home(model: type[BaseModel], word: str) -> str:
    """Where else in the document a key has its place."""
    for section, owner in model.model_fields.items():
        if any(word in inner.model_fields for inner in _models_at(owner.annotation, ())):
            return f"; it belongs in '{section}'"
    return ""


def _expected(kind: str, context: Mapping[str, Any]) -> str | None:
    if kind in ("enum", "literal_error"):
        return f"one of {context['expected']}"
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**context)
    return _KINDS.get(kind)


def _locate(loc: tuple[str | int, ...], data: object) -> tuple[Place, object]:
    """Follow pydantic's location through the data, leaving out its labels for the members of a union."""
    path: list[str | int] = []
    for part in loc:
        try:
            data = data[part]  # type: ignore[index]  # whatever has no such part is left out
        except (TypeError, LookupError):
            continue
        path.append(part)
    return tuple(path), data


def _models_at(kind: Any, path: Place) -> Iterator[type[BaseModel]]:
    """The models that a value at `path` below a value annotated as `kind` may be."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not path:
            yield kind
        elif path[0] in kind.model_fields:
            yield from _models_at(kind.model_fields[str(path[0])].annotation, path[1:])
        return
    inside = path if get_origin(kind) in (Annotated, Union, UnionType) else path[1:]
    for argument in get_args(kind):
        yield from _models_at(argument, inside)


def _shown(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"'{value}'"
        case list():
            return "a list"
        case Mapping():
            return "a mapping"
    return str(value)
