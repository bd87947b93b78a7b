from __future__ import annotations

from pathlib import Path

import pytest

from llmc.compiler import catalogue
from llmc.compiler.errors import LlmcError
from llmc.passes.base import discover

PAGE = Path(__file__).parent.parent.parent / "docs/passes.md"


def test_the_committed_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == catalogue.markdown(), "make schema writes it anew"


def test_every_pass_says_how_safe_it_is_and_where_it_comes_from() -> None:
    for key, kind in discover().items():
        text = catalogue.describe(kind)["description"]
        assert "**Safety:**" in text, key
        assert "Source:" in text, key
        assert all(row["description"] for row in catalogue.parameters(kind)), key


def test_nested_parameters_have_dotted_names() -> None:
    names = [row["name"] for row in catalogue.parameters(discover()["quantize-int8"])]
    assert "calibration.samples" in names


def test_an_unknown_pass_gets_the_nearest() -> None:
    with pytest.raises(LlmcError, match="no pass is called 'fuse-gleu'; did you mean 'fuse-gelu'"):
        catalogue.find("fuse-gleu")
