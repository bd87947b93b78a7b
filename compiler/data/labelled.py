"""Labelled texts, for measures of a task."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.compiler.errors import LlmcError


@dataclass(frozen=True)
class Labelled:
    """One line of labelled data."""

    line: int
    text: str
    pair: str | None = None
    label: float | None = None


def read_labelled(path: Path, *, pairs: bool, labels: bool) -> list[Labelled]:
    """The lines of a .jsonl file, or of a .tsv file with a header: text, text_pair, label.

    `pairs` and `labels` say what every line must have; without them a text file with one text a line will do. Raises
    LlmcError, which names the line, for what is missing or no number.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LlmcError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        rows = _from_jsonl(path, content)
    elif path.suffix == ".tsv":
        rows = _from_tsv(path, content)
    elif not pairs and not labels:
        rows = [(number, {"text": line}) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    else:
        raise LlmcError(f"{path}: labelled data is a .jsonl or a .tsv file")
    if not rows:
        raise LlmcError(f"{path} holds no samples")
    return [_labelled(path, number, row, pairs=pairs, labels=labels) for number, row in rows]


def _from_jsonl(path: Path, content: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise LlmcError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise LlmcError(f"{path}:{number} is no object with text and label")
            rows.append((number, row))
    return rows


def _from_tsv(path: Path, content: str) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(content.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    if "text" not in (reader.fieldnames or ()):
        raise LlmcError(f"{path}:1 is no header: its columns are text, text_pair and label, parted by tabs")
    return [(reader.line_num, row) for row in reader]


def _labelled(path: Path, number: int, row: dict[str, Any], *, pairs: bool, labels: bool) -> Labelled:
    wanted = {"text": True, "text_pair": pairs, "label": labels}
    missing = next((name for name, needed in wanted.items() if needed and row.get(name) in (None, "")), None)
    if missing is not None:
        raise LlmcError(f"{path}:{number} has no {missing}")
    try:
        label = float(row["label"]) if labels else None
    except (TypeError, ValueError) as error:
        raise LlmcError(f"{path}:{number}: label '{row['label']}' is no number") from error
    pair = row.get("text_pair")
    return Labelled(number, str(row["text"]), None if pair in (None, "") else str(pair), label)
