"""The page: whole, self-contained, and nothing in it that a model's names could have put there."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from llmc.compiler.report import OutputNumerics, Report, html
from llmc.compiler.report.text import printable

VOID = {"meta"}
PAGE_TAGS = {"html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "div"}
TEXT_TAGS = {"p", "h1", "h2", "h3", "ul", "li", "dl", "dt", "dd", "span", "strong", "i", "code", "details", "summary"}
TABLE_TAGS = {"table", "thead", "tbody", "tr", "th", "td"}
CHART_TAGS = {"svg", "g", "rect", "line", "circle", "text", "tspan", "title", "path"}


class Page(HTMLParser):
    """Reads a page as a browser would: elements with their attributes, and the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def texts_in(self, tag: str) -> list[str]:
        return [text for within, text in self.texts if within == tag]


def test_the_page_is_well_formed_and_says_the_facts(report: Report) -> None:
    page = Page(html.render(report))
    said = {text for _, text in page.texts}
    assert {
        "fuse-gelu",
        "21 → 12 nodes",
        "2.87 G",
        "46.8 MB",
        "0.999980",
        "max abs 2.0e-03",
        "0.16 s",
    } <= said
    assert "2.87 GFLOP at encoder.layer.0/MatMul_1 128, without 2 products of unknown cost" in said
    assert page.texts_in("h2") == [
        "Nodes through the passes",
        "Error after each pass, against torch",
        "Passes",
        "Assignments that fuse-gelu measured",
        "What fuse-gelu quantized",
        "Near misses",
        "Operators before and after",
        "Precision of layers",
        "Graph",
        "Target: tensorrt-rtx",
        "Where it came from",
    ]


def test_names_are_text_wherever_they_stand(hostile: tuple[str, Report]) -> None:
    name, report = hostile
    page = Page(html.render(report))
    plain = Page(html.render(report.model_copy(update={"recipe": "plain"})))
    assert {tag for tag, _ in page.elements} <= PAGE_TAGS | TEXT_TAGS | TABLE_TAGS | CHART_TAGS
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert page.texts_in("h1") == [printable(name)]
    assert printable(name) in page.texts_in("code")
    assert page.texts_in("title")[0] == f"llmc: {printable(name)} · {printable(name)}"


def test_no_attribute_acts(hostile: tuple[str, Report]) -> None:
    _, report = hostile
    attributes = {key for _, attrs in Page(html.render(report)).elements for key in attrs}
    assert not attributes & {"src", "href", "style", "srcdoc", "action"}
    assert not any(key.startswith("on") for key in attributes)


def test_nothing_is_fetched_or_run(report: Report) -> None:
    page = html.render(report)
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert "@import" not in page
    policies = [attrs for tag, attrs in Page(page).elements if tag == "meta" and "http-equiv" in attrs]
    assert policies[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_light_and_dark(report: Report) -> None:
    assert "@media (prefers-color-scheme: dark)" in html.render(report)


def test_the_same_report_gives_the_same_bytes(report: Report) -> None:
    assert html.render(report) == html.render(Report.model_validate_json(report.model_dump_json()))


def test_the_errors_of_each_pass_are_drawn(report: Report) -> None:
    """max abs 2e-3, relative L2 8e-4, 1 − cosine 2e-5, on an axis from 1e-6 to the budget of 0.1: five decades."""
    report.passes[1].frontier = []
    page = Page(html.render(report))
    places = [attrs["cx"] for tag, attrs in page.elements if tag == "circle"]
    assert places == ["66.02%", "58.06%", "26.02%"] * 2
    limits = [attrs["x1"] for tag, attrs in page.elements if tag == "line" and "limit" in (attrs["class"] or "")]
    assert limits == ["60.00%", "100.00%"]  # cosine at 0.999, max abs at 0.1


def test_numbers_that_are_not_finite_stand_out(report: Report) -> None:
    broken = OutputNumerics(
        output="y", max_abs=float("inf"), relative_l2=float("inf"), cosine=float("nan"), sqnr_db=None, finite=False
    )
    report.passes[1].frontier = []
    report.passes[1].numerics = [*report.passes[1].numerics, broken]
    marks = [attrs for tag, attrs in Page(html.render(report)).elements if tag == "circle"]
    assert [(mark["cx"], mark["class"]) for mark in marks[3:]] == [("100%", "mark broken")] * 3


def test_steps_that_changed_nothing_are_equal(report: Report) -> None:
    """Cosines of equal vectors are a rounding away from 1; steps that were not compared say so."""
    same = OutputNumerics(output="y", max_abs=0.0, relative_l2=0.0, cosine=1 - 2**-52, sqnr_db=None, finite=True)
    report.passes[1].frontier = []
    report.passes[1].numerics = [same]
    page = Page(html.render(report))
    assert len([tag for tag, _ in page.elements if tag == "circle"]) == 3
    words = {"equal", "not compared", "unchanged"}
    assert [word for word in page.texts_in("tspan") if word in words] == ["equal", "unchanged"]
    report.passes[2].rewrites = report.passes[1].rewrites
    not_verified = Page(html.render(report))
    assert [word for word in not_verified.texts_in("tspan") if word in words] == ["equal", "not compared"]


def test_what_a_search_measured_is_drawn_and_listed(report: Report) -> None:
    page = Page(html.render(report))
    assert {"2 of 3 layers · 5 kB · time 0.50 · chosen", "3 of 3 layers · 4 kB · time 0.25"} <= {
        t for _, t in page.texts
    }
    marks = [attrs for tag, attrs in page.elements if tag == "circle"]
    report.passes[1].frontier = []
    assert len(marks) == 4 + len([tag for tag, _ in Page(html.render(report)).elements if tag == "circle"])


@pytest.mark.parametrize("field", ["verification", "target"])
def test_a_report_without_a_part_has_a_page(field: str, report: Report) -> None:
    Page(html.render(report.model_copy(update={field: None})))


def test_a_report_of_no_passes_has_a_page(report: Report) -> None:
    graph = report.graph.model_copy(update={"nodes": {}, "weights": {}, "flops": None})
    Page(html.render(report.model_copy(update={"passes": [], "precision": [], "graph": graph})))
