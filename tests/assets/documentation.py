"""Text for training and measuring small language models: the documentation of the Python that runs this.

Two sources: the topics of `help()` (pydoc_data) and the docstrings of the standard library. Nothing of it is kept in
the repository, and the wording differs a little between versions of Python; which part is held out does not.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = 20
"""One document in this many is kept from training."""
SHORTEST = 80
"""Characters; shorter docstrings say little ('See base class.')."""
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "turtledemo", "ensurepip"}


def training() -> list[str]:
    """The documents to learn from."""
    return [text for name, text in _documents() if not _held_out(name)]


def held_out() -> list[str]:
    """The documents that no training has seen."""
    return [text for name, text in _documents() if _held_out(name)]


def _held_out(name: str) -> bool:
    """By the name of the topic or module alone: no text moves from one side to the other with Python's version."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT == 0


def _documents() -> Iterator[tuple[str, str]]:
    """(topic or module, text) in a fixed order, each text once."""
    seen = set()
    for name, text in [*sorted(topics.items()), *_docstrings()]:
        text = text.strip()
        if len(text) >= SHORTEST and text not in seen:
            seen.add(text)
            yield name, text


def _docstrings() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if LEFT_OUT.isdisjoint(place.parts):
            for text in _docstrings_of(path):
                yield place.as_posix(), text


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a template of lib2to3, say
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield inspect.cleandoc(text)
