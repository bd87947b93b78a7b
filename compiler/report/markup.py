"""HTML and SVG elements as function calls, and the blocks of a page made of them: every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from llmc.compiler.report.text import printable


class Markup(str):
    """HTML that needs no more escaping; made by `element` alone."""

    __slots__ = ()


OPEN_UP_TO = 12
"""Rows of a list that stands open; longer ones are folded."""

Child = str | int | None
"""Text (escaped), an element, or nothing."""


def element(tag: str, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """`element("td", name, class_="name")` → '<td class="name">…</td>'.

    In attribute names a trailing underscore is dropped and others become hyphens (`text_anchor`); one that is None or
    False is left out, True stands alone.
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: Child) -> Markup:
    """Children side by side."""
    return Markup("".join(_child(child) for child in children))


def _child(child: Child) -> str:
    if child is None:
        return ""
    return child if isinstance(child, Markup) else escape(printable(str(child)))


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    key = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {key}"
    written = f"{value:.4g}" if isinstance(value, float) else escape(printable(str(value)))
    return f' {key}="{written}"'


def section(heading: str, *children: Child) -> Markup:
    """A card of the page."""
    return element("section", element("h2", heading), *children, class_="card")


def fold(heading: str, count: int, content: Markup) -> Markup:
    """A list of `count` rows below a heading that folds it away."""
    line = element("summary", heading, element("span", f"{count:,}", class_="count"))
    return element("details", line, content, open=count <= OPEN_UP_TO)


def table(headings: Sequence[str], rows: Iterable[Sequence[Child]]) -> Markup:
    """A table that scrolls by itself where it is wider than the page; a heading that starts with '#' is of numbers."""
    kinds = ["number" if heading.startswith("#") else None for heading in headings]
    head = [element("th", h.removeprefix("#"), class_=kind) for h, kind in zip(headings, kinds, strict=True)]
    body = [
        element("tr", *(element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in rows
    ]
    whole = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", whole, class_="scroll")


def pairs(lines: Iterable[tuple[str, Child]]) -> Markup:
    """Labels with what there is to say."""
    return element("dl", *(join(element("dt", label), element("dd", value)) for label, value in lines))


def code(name: str) -> Markup:
    """A name as it stands in a model or a program."""
    return element("code", name)


def place(node: str, module: str) -> Markup:
    """A node, and below it the module of the source model it came from."""
    return join(code(node), element("span", module, class_="module") if module else None)


def legend(*items: tuple[str, str]) -> Markup:
    """What the colours of a chart mean: style class and words."""
    keys = [element("span", element("i", class_=class_), label) for class_, label in items]
    return element("p", *keys, class_="legend")
