"""`calibration.json`: what the passes of a compile asked of its calibration data, and the answers; read back by others.

One tensor a line, sorted, so that two of them compare with `diff`. Statistics hold for one model and for what the
passes before had made of it: they answer nobody else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from llmc.compiler.errors import LlmcError
from llmc.passes.base import Clipped

NAME = "calibration.json"
SHOWN = 5
"""Of the tensors that a file lacks."""


@dataclass(frozen=True)
class Section:
    """What one pass asked."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    key: str
    """Of the pass."""
    after: str
    """Digest of the passes before, and of their data."""
    data: str
    """Name of the data."""
    sha256: str
    """Digest of the data."""
    tensors: dict[str, Clipped] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    model: str
    """SHA-256 of the source."""
    passes: list[Section]


@dataclass(frozen=True)
class Statistics:
    """A pass's section of a file."""

    path: Path
    section: Section

    def answer(self, tensors: Sequence[str], method: str, percentile: float, samples: int) -> dict[str, Clipped]:
        """As `passes.base.Activations.amax`. Raises LlmcError for tensors that are not there or were asked otherwise.

        'minmax' is answered for every tensor: the largest magnitude is kept whatever the method was.
        """
        missing = [tensor for tensor in tensors if tensor not in self.section.tensors]
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise LlmcError(
                f"{self.path} has no statistics of {', '.join(missing[:SHOWN])}{more} for {self.section.key}: "
                "calibrate anew with calibration.data and without calibration.statistics"
            )
        found = {}
        for tensor in tensors:
            known = self.section.tensors[tensor]
            wanted = Clipped(method, percentile, known.samples, known.amax, known.clip)
            if method == "minmax":
                wanted = Clipped(method, 100.0, known.samples, known.amax, known.amax)
            elif known != wanted or known.samples > samples:
                raise LlmcError(
                    f"{self.path}: '{tensor}' was calibrated with {_told(known)}, {self.section.key} asks for "
                    f"{_told(Clipped(method, percentile, samples, 0.0, 0.0))}: ask for the same, or calibrate anew"
                )
            found[tensor] = wanted
        return found


def _told(asked: Clipped) -> str:
    percent = f" {asked.percentile:g}" if asked.method == "percentile" else ""
    return f"{asked.method}{percent} over {asked.samples} samples"


def read(path: Path, model: str, key: str, after: str) -> Statistics:
    """What the file has for pass `key`, after the passes before it, on the source with digest `model`.

    Raises LlmcError where it has nothing, or not for this model or these passes.
    """
    try:
        found = TypeAdapter(_File).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise LlmcError(f"{path} is no {NAME} of llmc: {_first_line(error)}") from error
    if found.model != model:
        raise LlmcError(
            f"{path} was made for another model: sha256 {found.model[:12]}…, this one has {model[:12]}…; "
            "calibrate this one with calibration.data"
        )
    of_pass = [section for section in found.passes if section.key == key]
    if not of_pass:
        raise LlmcError(f"{path} has no statistics for {key}; it has: {', '.join(s.key for s in found.passes) or '-'}")
    section = next((section for section in of_pass if section.after == after), None)
    if section is None:
        raise LlmcError(
            f"{path}: the statistics for {key} were made after other passes, or with other data for them: what the "
            "pass meets is not what was measured; calibrate anew with calibration.data"
        )
    return Statistics(path, section)


def _first_line(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    detail = error.errors(include_url=False)[0]
    place = ".".join(map(str, detail["loc"]))
    return f"{place}: {detail['msg']}" if place else detail["msg"]


def write(folder: Path, model: str, sections: Sequence[Section]) -> None:
    """Write `calibration.json` into `folder`; nothing where no pass asked anything."""
    if not sections:
        return
    blocks = []
    for section in sections:
        about = {name: value for name, value in asdict(section).items() if name != "tensors"}
        lines = [
            f"      {json.dumps(tensor)}: {json.dumps(asdict(known), sort_keys=True)}"
            for tensor, known in sorted(section.tensors.items())
        ]
        head = "".join(f"    {json.dumps(name)}: {json.dumps(value)},\n" for name, value in about.items())
        blocks.append("   {\n" + head + '    "tensors": {\n' + ",\n".join(lines) + "\n    }\n   }")
    text = f'{{\n  "model": {json.dumps(model)},\n  "passes": [\n' + ",\n".join(blocks) + "\n  ]\n}\n"
    (folder / NAME).write_text(text, encoding="utf-8")
