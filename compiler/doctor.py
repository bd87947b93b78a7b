"""What this machine can load and build, and what to install for more. Imports nothing heavy."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from llmc.compiler.targets import Availability, TargetKind, availability, installed_version
from llmc.compiler.targets.gpu import Gpu, driver
from llmc.compiler.targets.onnxruntime import DISTRIBUTIONS
from llmc.compiler.versions import ALWAYS, HUGGINGFACE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_EXPORTER = ("torch", "transformers", "onnxscript")
"""What the extra `hf` adds."""


class Loader(BaseModel):
    """Whether one kind of source can be loaded here."""

    kind: str
    missing: str = Field("", description="What stands in the way; empty where nothing does.")
    install: str = Field("", description="The command that gets what is missing.")


class Diagnosis(BaseModel):
    """The state of this machine."""

    model_config = ConfigDict(frozen=True)

    python: str
    system: str
    cuda: str = Field(description="The newest CUDA version that the installed driver runs; empty without a driver.")
    gpus: tuple[Gpu, ...]
    targets: tuple[Availability, ...] = Field(description="In the order in which target 'auto' prefers them.")
    auto: TargetKind = Field(description="What target 'auto' means here.")
    loaders: tuple[Loader, ...]
    packages: dict[str, str] = Field(description="Package → version; empty for one that is not installed.")


def examine() -> Diagnosis:
    """Look at this machine."""
    found = driver()
    targets = availability()
    packages = sorted({*ALWAYS, *HUGGINGFACE, "polygraphy"} - {"onnxruntime"})
    return Diagnosis(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cuda=found.cuda if found else "",
        gpus=found.gpus if found else (),
        targets=targets,
        auto=next(target.kind for target in targets if not target.missing),
        loaders=(Loader(kind="onnx"), _hugging_face()),
        packages={name: installed_version(name) for name in packages}
        | {"onnxruntime": installed_version(*DISTRIBUTIONS)},
    )


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Print a diagnosis."""
    from rich.text import Text

    versions = (f"{name} {version or 'not installed'}" for name, version in sorted(diagnosis.packages.items()))
    for heading, body in (
        ("Machine", Text(", ".join((diagnosis.system, f"Python {diagnosis.python}", _gpus(diagnosis))))),
        ("Targets", _table(diagnosis.targets, diagnosis.auto)),
        ("Loads", _table(diagnosis.loaders)),
        ("Packages", Text(", ".join(versions))),
    ):
        console.print(heading, style="bold")
        console.print(body, style="" if heading != "Packages" else "dim")
        console.print()


def _hugging_face() -> Loader:
    absent = [name for name in _EXPORTER if not find_spec(name)]
    if not absent:
        return Loader(kind="huggingface")
    return Loader(
        kind="huggingface",
        missing=f"not installed: {', '.join(absent)}",
        install="pip install 'llmc-compiler[hf]'",
    )


def _gpus(diagnosis: Diagnosis) -> str:
    if not diagnosis.gpus:
        return "no NVIDIA GPU"
    names = [f"{gpu.name} (SM{gpu.compute_capability}, {gpu.memory / 2**30:.0f} GiB)" for gpu in diagnosis.gpus]
    return f"{', '.join(names)}, driver for CUDA {diagnosis.cuda}"


def _table(entries: Sequence[Availability | Loader], auto: str = "") -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for entry in entries:
        mark = Text("✗", "red") if entry.missing else Text("✓", "green")
        if entry.missing:
            says = f"{entry.missing}; install it with: {entry.install}" if entry.install else entry.missing
        else:
            says = entry.version if isinstance(entry, Availability) else ""
        note = "  (what target 'auto' means here)" if entry.kind == auto else ""
        table.add_row(mark, Text(entry.kind), Text(says + note))
    return table
