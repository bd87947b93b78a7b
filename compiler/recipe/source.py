"""YAML text → plain values, each of which knows the line that it stands on; and back.

Scalars are read by YAML 1.2's core schema, not 1.1's: `on` and `no` are words, `1e-3` is a number, `1:30` and
`010` are not a time and not octal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmc.compiler.errors import LlmcError

Place = tuple[str | int, ...]
"""Where a value stands in a document: ('passes', 2, 'quantize-int8', 'calibration')."""

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]{1,99}|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    """Reads scalars by `_CORE_SCHEMA`."""


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `_Loader` would read as something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002  # PyYAML's hook
        """Indent the items of a list below its key."""
        super().increase_indent(flow, False)

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Escape what YAML would fold or drop (line ends of every kind, control characters)."""
        return self.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)
for _side in (_Loader, _Dumper):
    _side.yaml_implicit_resolvers = {}
    for _name, _pattern, _first in _CORE_SCHEMA:
        _side.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a document, in plain words."""

    place: Place
    message: str


@dataclass(frozen=True)
class Source:
    """A document's plain values, the line of each, and what was wrong with the text itself."""

    label: str
    value: Any
    lines: Mapping[Place, int | str]
    """The line of a key or list item; for a value from outside the file, the option that set it ('--set')."""
    faults: tuple[Fault, ...] = ()

    def line(self, place: Place) -> int | str:
        """The option that set `place` or a part of it; else the line of it, or of the nearest thing around it."""
        for known, line in self.lines.items():
            if isinstance(line, str) and known[: len(place)] == place:
                return line
        while place not in self.lines and place:
            place = place[:-1]
        return self.lines.get(place, 1)

    def where(self, place: Place) -> str:
        """'recipe.yaml:7', or '--set' for a value from outside the file."""
        line = self.line(place)
        return line if isinstance(line, str) else f"{self.label}:{line}"

    def error(self, faults: Iterable[Fault]) -> LlmcError:
        """All faults as one error: a line each, in the order of the document."""
        lines = [(self.where(f.place), dotted(f.place), f.message) for f in sorted(faults, key=self._order)]
        return LlmcError("\n".join(dict.fromkeys(": ".join(filter(None, line)) for line in lines)))

    def _order(self, fault: Fault) -> tuple[int, str]:
        line = self.line(fault.place)
        return (0, line) if isinstance(line, str) else (line, dotted(fault.place))


def dotted(place: Place) -> str:
    """A place as `--set` writes it, lists counted from 1: 'passes.quantize-int8.samples', 'target.profiles.1'."""
    named_pass = place[:1] == ("passes",) and len(place) > 2
    parts = (place[0], *place[2:]) if named_pass else place
    return ".".join(str(part + 1) if isinstance(part, int) else part for part in parts)


def read(path: Path, label: str) -> Source:
    """Read a YAML file. Raises LlmcError where there is no such file, or its text is not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LlmcError(f"{label}: no such file") from error
    except OSError as error:
        raise LlmcError(f"{label}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LlmcError(f"{label}: not a text file (UTF-8 is needed)") from error
    return parse(text, label)


def parse(text: str, label: str, *, numbered: bool = True) -> Source:
    """Parse one YAML document; its lines are of no interest where not `numbered`. Raises LlmcError for other text."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        reader = _Reader()
        value = None if root is None else reader.value(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and numbered else ""
        raise LlmcError(f"{label}{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise LlmcError(f"{label}: not YAML: {error}") from error
    except RecursionError as error:
        raise LlmcError(f"{label}: nested too deeply") from error
    lines: Mapping[Place, int | str] = {(): 1, **reader.lines} if numbered else {(): label}
    return Source(label, value, lines, tuple(reader.faults))


def dump(value: object, header: Sequence[str] = (), *, line_each: bool = False) -> str:
    """YAML text that `parse` reads back to the same value, below comment lines; keys keep their order.

    Small lists and mappings stand on one line, unless every value is to have a line of its own.
    """
    flow = False if line_each else None
    comments = "".join(f"# {line}\n" for line in header)
    return comments + yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, allow_unicode=True, width=110
    )


class _Reader:
    """Turns composed nodes into values, keeping lines and faults."""

    def __init__(self) -> None:
        self.lines: dict[Place, int] = {}
        self.faults: list[Fault] = []
        self.open: set[int] = set()

    def value(self, node: yaml.Node, place: Place) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, place)
        if id(node) in self.open:
            self.faults.append(Fault(place, "this alias stands inside the value that it repeats"))
            return None
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            value: Any = dict(self.entries(node, place))
        else:
            value = [self.item(item, (*place, index)) for index, item in enumerate(node.value)]
        self.open.discard(id(node))
        return value

    def item(self, node: yaml.Node, place: Place) -> Any:
        self.lines[place] = node.start_mark.line + 1
        return self.value(node, place)

    def entries(self, mapping: yaml.MappingNode, place: Place) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key_node, node in mapping.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append(Fault(place, f"the key on line {line} is not a word"))
                continue
            key = key_node.value
            here = (*place, key)
            if key in seen:
                self.faults.append(Fault(here, f"stands twice: on line {seen[key]} and on line {line}"))
                continue
            seen[key] = self.lines[here] = line
            yield key, self.value(node, here)

    def scalar(self, node: yaml.ScalarNode, place: Place) -> Any:
        text = node.value
        match node.tag.removeprefix(_TAG):
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            case "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str":
                return text
            case tag:
                self.faults.append(Fault(place, f"the tag '{tag}' has no meaning here"))
                return None
