"""Elements: what is put in stays text, in content and in attributes."""

from __future__ import annotations

from llmc.compiler.report.markup import element, fold, join


def test_children_are_escaped_and_elements_are_not() -> None:
    assert element("p", "a < b & c", element("b", 7), None) == "<p>a &lt; b &amp; c<b>7</b></p>"
    assert join("<", element("i")) == "&lt;<i></i>"


def test_attributes_are_escaped() -> None:
    assert element("a", title='" onload="x') == '<a title="&quot; onload=&quot;x"></a>'


def test_attribute_names_and_flags() -> None:
    written = element("text", class_="x", text_anchor="end", x=0.123456, open=True, hidden=False, id=None)
    assert written == '<text class="x" text-anchor="end" x="0.1235" open></text>'


def test_long_lists_are_folded() -> None:
    assert fold("Few", 12, element("p")).startswith("<details open>")
    assert fold("Many", 1234, element("p")).startswith('<details><summary>Many<span class="count">1,234</span>')
