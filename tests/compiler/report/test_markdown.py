"""The Markdown, read back by a CommonMark parser with GitHub's tables."""

from __future__ import annotations

from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

from llmc.compiler.report import Report, markdown
from llmc.compiler.report.text import printable


def tokens_of(document: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(document)


def inline(token: Token) -> str:
    """What a reader sees of one inline token."""
    return "".join(child.content for child in token.children or [] if child.type in ("text", "code_inline"))


def cells(document: str) -> list[list[str]]:
    rows: list[list[str]] = []
    for before, token in pairwise(tokens_of(document)):
        if token.type == "tr_open":
            rows.append([])
        elif before.type in ("th_open", "td_open"):
            rows[-1].append(inline(token))
    return rows


def test_the_document_says_the_facts(report: Report) -> None:
    document = markdown.render(report)
    rows = cells(document)
    assert ["✓", "fuse-gelu", "21 → 12", "1", "3", "4 kB", "0.999980", "2.0e-03", "0.16 s"] in rows
    assert ["int8", "int8", "float16", "1", "1 MatMul"] in rows
    assert ["encoder.layer.0/MatMul_1", "0.12 %", "1.27", "1.9", "0.01", "█▃"] in rows
    assert ["known", "", "2.54", "2.6", "0.02", ""] in rows
    assert [row for row in rows if row[0].startswith("2^")] == [
        ["2^-9", "3", "0"],
        ["2^-8", "0", "0"],
        ["2^-7", "1", "1"],
        ["2^-6", "0", "1"],
    ]
    assert "12 nodes, opset 20, FLOPs: 2.87 GFLOP" in document
    assert "> [!WARNING]" in document


def test_names_are_text_wherever_they_stand(hostile: tuple[str, Report]) -> None:
    name, report = hostile
    document = markdown.render(report)
    shown = printable(name)
    tokens = tokens_of(document)
    assert inline(tokens[1]) == shown
    blocks = {token.content.strip() for token in tokens if token.type == "html_block"}
    assert all(block == "</details>" or block.startswith("<details><summary>") for block in blocks)
    children = {child.type for token in tokens for child in token.children or []}
    assert children <= {"text", "text_special", "code_inline", "strong_open", "strong_close", "softbreak"}


def test_every_row_has_its_cells(hostile: tuple[str, Report]) -> None:
    name, report = hostile
    shown = printable(name)
    rows = cells(markdown.render(report))
    assert [shown, shown, shown, "3"] in rows
    assert [shown, "MatMul", "int8", "int8", "float16", shown] in rows
    assert ["input", shown, "int64", f"{shown} × ? × 3"] in rows


def test_ordinary_names_read_well_as_plain_text(report: Report) -> None:
    assert "| `encoder.layer.0/MatMul_1` |" in markdown.render(report)


def test_a_broken_budget_is_said_first(report: Report) -> None:
    report.passes[1].status, report.passes[1].reason = "over budget", "cosine is 0.98"
    assert "> [!CAUTION]\n> - fuse-gelu: cosine is 0.98\n" in markdown.render(report)


def test_the_same_report_gives_the_same_bytes(report: Report) -> None:
    assert markdown.render(report) == markdown.render(Report.model_validate_json(report.model_dump_json()))
