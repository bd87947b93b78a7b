"""report.json and the schema that is published for it."""

from __future__ import annotations

import json as parser
import math
from importlib.resources import files
from pathlib import Path

import jsonschema

from llmc.compiler.report import OutputNumerics, Report, json, write


def read(report: Report) -> dict[str, object]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    loaded: dict[str, object] = parser.loads(json.render(report), parse_constant=refuse)
    return loaded


def test_the_published_schema_is_fresh() -> None:
    """If this fails after a change to the model, write `schema_text()` to compiler/report/schema.json."""
    assert files("llmc.compiler.report").joinpath("schema.json").read_text(encoding="utf-8") == json.schema_text()


def test_the_schema_is_one_and_takes_reports(hostile: tuple[str, Report]) -> None:
    _, report = hostile
    jsonschema.Draft202012Validator.check_schema(json.json_schema())
    jsonschema.validate(read(report), json.json_schema(), jsonschema.Draft202012Validator)


def test_the_schema_refuses_what_is_no_report(report: Report) -> None:
    validator = jsonschema.Draft202012Validator(json.json_schema())
    assert not validator.is_valid({**read(report), "surprise": 1})
    assert not validator.is_valid({**read(report), "status": "fine"})
    assert not validator.is_valid({key: value for key, value in read(report).items() if key != "precision"})


def test_a_report_is_read_back_as_it_was(hostile: tuple[str, Report]) -> None:
    _, report = hostile
    assert Report.model_validate_json(json.render(report)) == report


def test_numbers_that_json_has_not_are_null(report: Report) -> None:
    report.passes[1].numerics = [
        OutputNumerics(output="y", max_abs=math.inf, relative_l2=math.nan, cosine=0.0, sqnr_db=None, finite=False)
    ]
    jsonschema.validate(read(report), json.json_schema(), jsonschema.Draft202012Validator)
    line = Report.model_validate_json(json.render(report)).passes[1].numerics[0]
    assert math.isnan(line.max_abs)
    assert math.isnan(line.relative_l2)
    assert (line.cosine, line.sqnr_db, line.finite) == (0.0, None, False)


def test_only_timings_differ_between_equal_compiles(report: Report) -> None:
    slower = report.model_copy(update={"timings": report.timings.model_copy(update={"total": 99.0})})
    fast, slow = read(report), read(slower)
    assert fast.pop("timings") != slow.pop("timings")
    assert parser.dumps(fast) == parser.dumps(slow)


def test_the_files_are_written(report: Report, tmp_path: Path) -> None:
    written = write(report, tmp_path)
    assert [path.name for path in written] == ["report.json", "report.md", "report.html"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write(report, tmp_path)] == first
