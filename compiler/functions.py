"""Functions of the user's own, by import path: 'module:function', or 'file.py:function'."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from llmc.compiler.errors import LlmcError

IMPORT_PATH = r"^(?:[A-Za-z_][\w.]*|.*[^/]\.py):[A-Za-z_]\w*$"


def is_function(path: Path) -> bool:
    """Whether a path names a function: its last part is an import path, and no file or folder."""
    return re.match(IMPORT_PATH, path.name) is not None and not path.exists()


def load_function(named: str, folder: Path, where: str) -> Callable[..., Any]:
    """The function; a module is looked for in `folder` and the working directory too, a file in `folder`.

    Raises LlmcError, whose message begins with `where`, for what is not there or cannot be imported.
    """
    place, _, name = named.rpartition(":")
    file = folder / place
    if place.endswith(".py") and not file.is_file():
        raise LlmcError(f"{where}: there is no {file}")
    try:
        with _path(file.parent if place.endswith(".py") else folder):
            module = _execute(file) if place.endswith(".py") else importlib.import_module(place)
            found = getattr(module, name)
    except Exception as error:  # whatever the code does when it is imported
        raise LlmcError(f"{where}: '{named}' cannot be imported: {told(error)}") from error
    if not callable(found):
        raise LlmcError(f"{where}: '{named}' is no function")
    return found  # type: ignore[no-any-return]


def code_of(function: Callable[..., Any]) -> str:
    """SHA-256 of the file that a function stands in."""
    file = getattr(sys.modules.get(getattr(function, "__module__", "")), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()


def told(error: Exception) -> str:
    """An error of the user's code, and the line that raised it: 'ValueError: no rows (data.py, line 3)'."""
    text = f"{type(error).__name__}: {error}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text


def _is_ours(file: str) -> bool:
    return file.startswith("<frozen ") or Path(file).resolve() in (Path(__file__).resolve(), Path(importlib.__file__))


def _execute(file: Path) -> ModuleType:
    """The module in a file, run anew."""
    name = f"_llmc_{hashlib.sha256(bytes(file.resolve())).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses and pickles of the file's own classes need it
    spec.loader.exec_module(module)
    return module


@contextmanager
def _path(folder: Path) -> Iterator[None]:
    """Python's search path with `folder` and the working directory in front."""
    before = list(sys.path)
    sys.path[:0] = [str(folder), str(Path.cwd())]
    try:
        yield
    finally:
        sys.path[:] = before
