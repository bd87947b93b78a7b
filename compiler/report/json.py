"""The report for programs, and the JSON Schema that it keeps to."""

from __future__ import annotations

import json
from typing import Any

from llmc.compiler.report import Report


def render(report: Report) -> str:
    """The report as JSON; the same report gives the same bytes, and only `timings` differs between equal compiles."""
    return report.model_dump_json(indent=2) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of report.json; `schema.json` beside this file is its text."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema(mode="serialization")}


def schema_text() -> str:
    """What `schema.json` must hold."""
    return json.dumps(json_schema(), indent=2) + "\n"
