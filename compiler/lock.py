"""`llmc.lock`: what a recipe compiled to, from what, and with what; `--locked` refuses a compile that would differ.

One file in a folder has an entry for each recipe there and each model that it is compiled for.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.compiler.errors import LlmcError
from llmc.compiler.recipe import is_shipped
from llmc.compiler.recipe.source import dump, read

NAME = "llmc.lock"
VERSION = 1
_HEADER = ("Written by llmc; keep it in version control. `llmc compile --locked` refuses what differs from it.",)
_ABSENT = "nothing"


@dataclass(frozen=True)
class Lock:
    """One entry of a lock file."""

    path: Path
    recipe: str
    source: str
    refuses: bool = False
    """Whether a compile that differs is refused; else the entry follows it."""

    @classmethod
    def of(cls, recipe: str, source: str, *, refuses: bool = False) -> Lock:
        """The entry of a recipe as it is named on the command line, and a model.

        The file stands beside the recipe; for recipes that ship with llmc, in the working directory. A model in that
        folder or below goes by its path from there, any other by its name.
        """
        folder = Path.cwd() if is_shipped(recipe) else Path(recipe).parent
        model = Path(source).expanduser()
        name = source
        if model.exists():
            inside = model.resolve().is_relative_to(folder.resolve())
            name = model.resolve().relative_to(folder.resolve()).as_posix() if inside else model.resolve().name
        return cls(folder / NAME, Path(recipe).name, name, refuses)

    def exists(self) -> bool:
        """Whether the file has this entry. Raises LlmcError where it is no lock file."""
        return self._entry(self._entries()) is not None

    def check(self, found: Mapping[str, Any]) -> None:
        """Where the lock refuses: raises LlmcError with every key below those of `found` that differs, or is new."""
        if not self.refuses:
            return
        entry = self._entry(self._entries())
        if entry is None:
            raise LlmcError(
                f"{self.path} has no entry for {self.recipe} of {self.source}: compile with --lock to make one"
            )
        lines = differences({key: entry.get(key) for key in found}, found)
        if lines:
            listed = "".join(f"\n  {line}" for line in lines)
            raise LlmcError(
                f"{self.path} locks {self.recipe} of {self.source} to something else:{listed}\n"
                "compile without --locked to accept the change"
            )

    def write(self, content: Mapping[str, Any]) -> list[str]:
        """Unless the lock refuses: set the entry, and leave the others; returns what has changed in it, key by key.

        Raises LlmcError where the file cannot be written.
        """
        if self.refuses:
            return []
        try:
            with self._held():
                entries = self._entries()
                changed = differences(self._entry(entries) or {}, content)
                entries.setdefault(self.recipe, {})[self.source] = dict(content)
                ordered = {recipe: dict(sorted(entries[recipe].items())) for recipe in sorted(entries)}
                if changed:
                    self._replace(dump({"version": VERSION, "recipes": ordered}, header=_HEADER, line_each=True))
        except OSError as error:
            raise LlmcError(f"{self.path} cannot be written: {error.strerror}") from error
        return changed

    def _entry(self, entries: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
        return entries.get(self.recipe, {}).get(self.source)

    def _entries(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        source = read(self.path, str(self.path))
        content = source.value
        if source.faults or not isinstance(content, dict) or not isinstance(content.get("recipes"), dict):
            raise LlmcError(f"{self.path} is no lock file of llmc: remove it, and compile with --lock")
        if content.get("version") != VERSION:
            raise LlmcError(f"{self.path} is of version {content.get('version')}; this llmc reads version {VERSION}")
        return dict(content["recipes"])

    @contextmanager
    def _held(self) -> Iterator[None]:
        """One process at a time changes the file: it holds the folder."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _replace(self, text: str) -> None:
        beside = self.path.with_name(f".{NAME}.partial")  # one name: a killed process leaves nothing that stays
        try:
            beside.write_text(text)
            beside.chmod(0o644)
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)


def differences(locked: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A line for each value that is not the same: 'versions.onnx: locked 1.22.0, found 1.23.0'."""
    before, after = (dict(_flat(content)) if content else {} for content in (locked, found))
    return [
        f"{key}: locked {before.get(key, _ABSENT)}, found {after.get(key, _ABSENT)}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def _flat(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every single value below, by its dotted key; lists count from 1."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and value:
        for number, item in enumerate(value, 1):
            yield from _flat(item, f"{key}.{number}")
    else:
        yield key, value
