"""What lies in a file: an ONNX model, an engine, or the report of an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from llmc.compiler.artifact import is_artifact
from llmc.compiler.errors import LlmcError
from llmc.compiler.report import EngineReport, ModelReport, Report

if TYPE_CHECKING:
    from rich.console import Console

ENGINES = (".engine", ".plan", ".trt")
"""What engine files are called; one of any other name is known by its first bytes."""

Inspection = Report | ModelReport | EngineReport
"""What can be known of a file."""


def inspect(path: Path, sizes: Mapping[str, int] | None = None) -> Inspection:
    """What `path` is: an artifact's report, the header of an engine, or the statistics of an ONNX model.

    `sizes` are those of symbolic dimensions, for a model's FLOPs. Raises LlmcError where `path` is none of these.
    """
    if not path.exists():
        raise LlmcError(f"{path} does not exist")
    if path.is_dir():
        if is_artifact(path):
            return _artifact(path)
        if not (path / "model.onnx").is_file():
            raise LlmcError(f"{path} is no artifact of llmc, and holds no model.onnx; give an ONNX file or an engine")
        return _model(path / "model.onnx", sizes or {})
    return _engine(path) if _is_engine(path) else _model(path, sizes or {})


def render(found: Inspection, console: Console) -> None:
    """Print what `inspect` found."""
    from llmc.compiler.report import terminal

    if isinstance(found, Report):
        terminal.render(found, console)
    elif isinstance(found, ModelReport):
        terminal.render_model(found, console)
    else:
        terminal.render_engine(found, console)


def parse_sizes(settings: Iterable[str]) -> dict[str, int]:
    """['batch=2', 'sequence=128'] → sizes by dimension. Raises LlmcError for anything else."""
    sizes = {}
    for setting in settings:
        name, _, size = setting.partition("=")
        if not name or not size.isdigit() or int(size) < 1:
            raise LlmcError(f"--size {setting}: should be a dimension and its size, as in batch=2")
        sizes[name] = int(size)
    return sizes


def _artifact(folder: Path) -> Report:
    path = folder / "report.json"
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise LlmcError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LlmcError(
            f"{path} is no report of this version of llmc: {where or 'the file'}: {first['msg']}"
        ) from error


def _is_engine(path: Path) -> bool:
    from llmc.compiler.targets.engine_header import MAGIC

    if path.suffix in ENGINES:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise LlmcError(f"{path} cannot be read: {error.strerror}") from error


def _engine(path: Path) -> EngineReport:
    from llmc.compiler.targets.engine_header import read

    header = read(path)
    return EngineReport(file=path.name, bytes=header.engine_bytes, header=asdict(header))


def _model(path: Path, sizes: Mapping[str, int]) -> ModelReport:
    from llmc.compiler.loaders.onnx_file import load_onnx
    from llmc.compiler.report.statistics import graph_report, layer_precision

    graph = load_onnx(path).graph
    return ModelReport(file=path.name, graph=graph_report(graph, sizes), precision=layer_precision(graph, {}, {}))
