"""Keys: SHA-256 over everything that has a say in a result, the code that computes it included."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pydantic_core import to_jsonable_python

from llmc.compiler import versions

_MENTION = re.compile(rb"llmc(?:\.\w+)+")


def key_of(*parts: object) -> str:
    """SHA-256 of plain values (and of models, dataclasses and paths in them); equal parts give equal keys."""
    text = json.dumps(to_jsonable_python(parts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def environment(kind: str = "onnx") -> Mapping[str, str]:
    """What has a say in every result beside llmc's own code: versions of packages, and the kind of processor."""
    return {**versions.collect(kind, {}), "machine": platform.machine()}


@cache
def code_digest(module: str) -> str:
    """SHA-256 of the sources of a module of llmc, and of all modules of llmc that it depends on.

    Every name of a module that stands in a source counts, and of a package all modules in its folder: sometimes more
    than is needed, never less, as imports are absolute.
    """
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        for known, path in _sources(name):
            if known not in found:
                found[known] = path
                todo += _read(path)[1]
    lines = [sys.version, *(f"{name} {_read(found[name])[0]}" for name in sorted(found))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def _read(path: Path) -> tuple[str, frozenset[str]]:
    """The digest of a source, and the modules of llmc that it names."""
    text = path.read_bytes()
    return hashlib.sha256(text).hexdigest(), frozenset(map(bytes.decode, _MENTION.findall(text)))


@cache
def _sources(name: str) -> tuple[tuple[str, Path], ...]:
    """(module, file) of a module, of all modules in a package, or of the nearest of its parents that is one.

    Nothing is imported: below the top, the place of a file follows from its name.
    """
    from llmc.passes.graph import KERNELS

    _, top, *below = name.split(".")
    folder = KERNELS if top == "kernels" else _folder(top)
    if folder is None:
        return ()
    if name == "llmc.kernels":  # a folder of packages that is none itself: what models hold is in their specs
        return tuple((f"{name}.{file.parent.name}.spec", file) for file in sorted(folder.glob("*/spec.py")))
    for end in range(len(below), -1, -1):
        place, known = folder.joinpath(*below[:end]), ".".join(["llmc", top, *below[:end]])
        if (place / "__init__.py").is_file():
            files = sorted(place.glob("*.py"))
            return tuple((f"{known}.{file.stem}" if len(files) > 1 else known, file) for file in files)
        if end and place.with_suffix(".py").is_file():
            return ((known, place.with_suffix(".py")),)
    return ()


@cache
def _folder(top: str) -> Path | None:
    """Where the package llmc.compiler, llmc.passes or llmc.configs stands."""
    spec = find_spec(f"llmc.{top}")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None
