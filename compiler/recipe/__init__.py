"""A recipe: what to load, which passes in which order, what to build, and how far outputs may move.

YAML, strict: every unknown key, pass or value is an error that names its file, line and key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from llmc.compiler.errors import LlmcError
from llmc.compiler.functions import is_function
from llmc.compiler.recipe.checks import check_references
from llmc.compiler.recipe.errors import plain_faults, suggestion
from llmc.compiler.recipe.sections import Document, ModelSection, TargetSection, VerifySection
from llmc.compiler.recipe.settings import apply, parse_setting
from llmc.compiler.recipe.source import Fault, Place, Source, dump, read
from llmc.compiler.recipe.splice import splice
from llmc.compiler.targets import Profile
from llmc.passes.base import Pass, discover, find

__all__ = ["Recipe", "shipped"]

SHIPPED = "llmc:"
"""`llmc:sentences.txt` in a recipe is the file of that name that ships with llmc."""

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been checked in full, short of the existence of the data that it names.

    Paths in it are absolute: they were relative to the recipe's file, or to the working directory where set from
    the command line. Two recipes are equal where they ask for the same, wherever it was written.
    """

    name: str = field(compare=False)
    model: ModelSection
    passes: tuple[Pass, ...]
    target: TargetSection
    verify: VerifySection
    source: Source = field(compare=False, repr=False)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Load the recipe that ships under a bare name ('fp16'), or a file. Raises LlmcError with all that is wrong."""
        path = Path(name_or_path)
        if _is_bare(name_or_path):
            path = _shipped_recipe(str(name_or_path))
            return cls._build(read(path, path.name), path.parent, path.stem)
        return cls._build(read(path, str(path)), path.parent, path.stem)

    @classmethod
    def _build(cls, source: Source, folder: Path, name: str) -> Self:
        source = splice(source, lambda shipped_name: cls.load(shipped_name).document()["passes"])
        faults = list(source.faults)
        document = _document(source, faults)
        passes = _passes(source, faults)
        if document is not None:
            faults += check_references(document, passes, source)
        if faults or document is None:
            raise source.error(faults)
        return cls(
            name=name,
            model=_anchored(document.model, folder),
            passes=tuple(_anchored(step, folder) for step in passes.values()),
            target=document.target,
            verify=_anchored(document.verify, folder),
            source=source,
        )

    def with_settings(self, settings: Iterable[str]) -> Self:
        """The recipe with `KEY=VALUE` settings applied in order: a dotted key, a YAML value.

        A pass is named by its key, or by its number where it stands twice; lists are counted from 1. Raises LlmcError
        as `load` does.
        """
        return self._set(map(parse_setting, settings), "--set")

    def with_values(self, values: Mapping[str, object], option: str = "--set") -> Self:
        """The recipe with dotted keys set to values, as `with_settings`; `option` is what errors name as the place."""
        return self._set(values.items(), option)

    def _set(self, settings: Iterable[tuple[str, object]], option: str) -> Self:
        chosen = list(settings)
        if not chosen:
            return self
        source = Source(self.source.label, self.document(), self.source.lines)
        for key, value in chosen:
            source = apply(source, key, to_jsonable_python(value), option)
        return self._build(source, Path.cwd(), self.name)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The optimization profiles, at least one: those of the target, each over the model's dimensions."""
        return tuple({**self.model.dimensions, **profile} for profile in self.target.profiles or ({},))

    def where(self, *place: str | int) -> str:
        """Where something was written, for messages: `where('passes', 2)` → 'fp16.yaml:12'. Counts from 0."""
        return self.source.where(place)

    def document(self, path: Callable[[Path], str] | None = None) -> dict[str, Any]:
        """The recipe as plain values with every default written out; `path` renders the paths in it."""
        path = path or _portable
        return {
            "model": _plain(self.model.model_dump(), path),
            "passes": [
                {step.key(): _plain(step.model_dump(), path)} if type(step).model_fields else step.key()
                for step in self.passes
            ],
            "target": _plain(self.target.model_dump(), path),
            "verify": _plain(self.verify.model_dump(), path),
        }

    def parameters(self, index: int) -> dict[str, Any]:
        """Those of one pass, as `document` writes them; passes count from 0."""
        return dict(_plain(self.passes[index].model_dump(), _portable))

    def resolved_yaml(self) -> str:
        """YAML with every default written out, which loads back to an equal recipe from any folder."""
        return dump(self.document(), header=[f"{self.name}, as resolved: every default written out"])

    def digest(self) -> str:
        """SHA-256 of what the recipe asks for; of data files only the name counts, so that it is the same anywhere."""
        text = json.dumps(self.document(lambda path: path.name), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_data(self) -> None:
        """Raises LlmcError where data that the recipe names is not there."""
        steps = ((("passes", i, p.key()), p) for i, p in enumerate(self.passes))
        sections = [(("model",), self.model), (("verify",), self.verify), *steps]
        missing = [
            Fault(place, f"no such file or folder: {path}")
            for start, section in sections
            for place, path in _paths(section, start)
            if not path.exists() and not is_function(path)
        ]
        if missing:
            raise self.source.error(missing)


def is_shipped(name_or_path: str | Path) -> bool:
    """Whether a recipe is one that ships with llmc, by name or as a file."""
    return _is_bare(name_or_path) or Path(name_or_path).resolve().parent == _shipped_folder()


def _is_bare(name_or_path: str | Path) -> bool:
    path = Path(name_or_path)
    return isinstance(name_or_path, str) and path.name == name_or_path and not path.suffix


def shipped() -> list[tuple[str, str]]:
    """The recipes that ship with llmc: name and description, which is the first comment line of the file."""
    return [(path.stem, _description(path)) for path in sorted(_shipped_folder().glob("*.yaml"))]


def _description(path: Path) -> str:
    comments = (line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((text for text in comments if text and not text.startswith("yaml-language-server")), "")


@cache
def _shipped_folder() -> Path:
    return Path(str(resources.files("llmc.configs"))).resolve()


def _shipped_recipe(name: str) -> Path:
    path = _shipped_folder() / f"{name}.yaml"
    if not path.is_file():
        names = [known for known, _ in shipped()]
        raise LlmcError(f"no recipe called '{name}' ships with llmc{suggestion(name, names)} (a file: './{name}')")
    return path


def _document(source: Source, faults: list[Fault]) -> Document | None:
    if not isinstance(source.value, dict):
        faults.append(Fault((), f"a recipe is a mapping of {', '.join(Document.model_fields)}"))
        return None
    try:
        return Document.model_validate_json(json.dumps(source.value))
    except ValidationError as error:
        faults += plain_faults(error, Document, source.value, ())
        return None


def _passes(source: Source, faults: list[Fault]) -> dict[int, Pass]:
    """Position in the recipe → pass; what is wrong with the others goes to `faults`."""
    items = source.value.get("passes") if isinstance(source.value, dict) else None
    found = {}
    for index, item in enumerate(items if isinstance(items, list) else ()):
        step = _pass(item, ("passes", index), faults)
        if step is not None:
            found[index] = step
    return found


def _pass(item: object, place: Place, faults: list[Fault]) -> Pass | None:
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, dict) or len(item) != 1:
        faults.append(Fault(place, "a pass is its name, or its name and a colon with the parameters indented below"))
        return None
    ((key, parameters),) = item.items()
    kind = find(key)
    if kind is None:
        faults.append(Fault(place, f"no pass is called '{key}'{suggestion(key, discover())}"))
        return None
    parameters = {} if parameters is None else parameters
    try:
        return kind.model_validate_json(json.dumps(parameters))
    except ValidationError as error:
        faults += plain_faults(error, kind, parameters, (*place, key))
        return None


def _paths(model: BaseModel, place: Place) -> Iterator[tuple[Place, Path]]:
    """Every path among the values of a model and of the models in it."""
    for name, value in model:
        if isinstance(value, Path):
            yield (*place, name), value
        elif isinstance(value, BaseModel):
            yield from _paths(value, (*place, name))


def _anchored(model: Model, folder: Path) -> Model:
    """The model with every path in it made absolute."""
    changed: dict[str, object] = {}
    for name, value in model:
        if isinstance(value, Path):
            changed[name] = _absolute(value, folder)
        elif isinstance(value, BaseModel):
            changed[name] = _anchored(value, folder)
    return model.model_copy(update=changed) if changed else model


def _absolute(path: Path, folder: Path) -> Path:
    text = str(path)
    if text.startswith(SHIPPED):
        return _shipped_folder() / text.removeprefix(SHIPPED)
    return (folder / path.expanduser()).resolve()


def _portable(path: Path) -> str:
    return f"{SHIPPED}{path.name}" if path.parent == _shipped_folder() else str(path)


def _plain(value: object, path: Callable[[Path], str]) -> Any:
    if isinstance(value, Path):
        return path(value)
    if isinstance(value, Mapping):
        return {key: _plain(item, path) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, path) for item in value]
    return to_jsonable_python(value)
