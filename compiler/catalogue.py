"""The passes as help and documentation: everything here is read off their classes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from llmc.compiler.errors import LlmcError
from llmc.compiler.recipe.errors import suggestion
from llmc.passes import base
from llmc.passes.base import Pass, discover

if TYPE_CHECKING:
    from rich.console import Console


def find(key: str) -> type[Pass]:
    """The pass of that key. Raises LlmcError with the nearest one."""
    kind = base.find(key)
    if kind is None:
        raise LlmcError(f"no pass is called '{key}'{suggestion(key, discover())}")
    return kind


def as_json() -> list[dict[str, Any]]:
    """Every pass as plain values."""
    return [describe(kind) for kind in discover().values()]


def describe(kind: type[Pass]) -> dict[str, Any]:
    """One pass as plain values."""
    return {
        "key": kind.key(),
        "summary": kind.summary(),
        "safety": kind.safety,
        "after": list(kind.after),
        "needs": list(kind.needs),
        "parameters": list(parameters(kind)),
        "description": inspect.cleandoc(kind.__doc__ or ""),
    }


def parameters(model: type[BaseModel], prefix: str = "") -> Iterator[dict[str, Any]]:
    """Name ('calibration.samples'), default and description of each parameter, nested ones too."""
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from parameters(type(default), f"{prefix}{name}.")
        else:
            shown = None if default is PydanticUndefined else to_jsonable_python(default)
            yield {"name": f"{prefix}{name}", "default": shown, "description": field.description or ""}


def render_list(console: Console) -> None:
    """Key, safety and summary of every pass."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for kind in discover().values():
        table.add_row(f"[bold]{kind.key()}[/]", kind.safety, kind.summary())
    console.print(table)
    console.print("\n[dim]llmc passes NAME describes one in full[/]")


def render_pass(kind: type[Pass], console: Console) -> None:
    """One pass: its description and its parameters."""
    from rich.markdown import Markdown
    from rich.table import Table

    console.print(f"[bold]{kind.key()}[/]")
    console.print(Markdown(inspect.cleandoc(kind.__doc__ or "")))
    rows = list(parameters(kind))
    if rows:
        table = Table("parameter", "default", "", box=None, pad_edge=False)
        for row in rows:
            table.add_row(row["name"], str(row["default"]), row["description"])
        console.print()
        console.print(table)
    if kind.after:
        console.print(f"\nStands after {', '.join(kind.after)} in a recipe.")


def markdown() -> str:
    """The catalogue page: every pass with its description and parameters."""
    parts = ["# Passes", "", "Made from the pass classes by `make schema`; `llmc passes NAME` prints the same.", ""]
    parts += [f"- [{kind.key()}](#{kind.key()}) ({kind.safety}): {kind.summary()}" for kind in discover().values()]
    for kind in discover().values():
        parts += ["", f"## {kind.key()}", "", inspect.cleandoc(kind.__doc__ or "")]
        rows = list(parameters(kind))
        if rows:
            parts += ["", "| Parameter | Default | |", "|---|---|---|"]
            parts += [f"| `{row['name']}` | `{json.dumps(row['default'])}` | {row['description']} |" for row in rows]
        if kind.after:
            parts += ["", f"Stands after {', '.join(f'`{key}`' for key in kind.after)} in a recipe."]
    return "\n".join(parts) + "\n"
