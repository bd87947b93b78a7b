"""What one part of a recipe says about another, checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llmc.compiler.recipe.errors import suggestion
from llmc.compiler.recipe.sections import Document
from llmc.compiler.recipe.source import Fault, Source
from llmc.passes.base import Pass


def check_references(document: Document, passes: Mapping[int, Pass], source: Source) -> Iterator[Fault]:
    """Faults in the order of passes (by position in the recipe), and in names that nothing else in it has."""
    yield from _check_order(passes, source)
    yield from _check_dimensions(document)
    keys = {step.key() for step in passes.values()}
    if len(passes) == len(document.passes):
        for key in document.verify.pass_budgets:
            if key not in keys:
                yield Fault(("verify", "pass_budgets", key), f"this recipe has no such pass{suggestion(key, keys)}")


def _check_order(passes: Mapping[int, Pass], source: Source) -> Iterator[Fault]:
    keys = {index: step.key() for index, step in passes.items()}
    for index, step in passes.items():
        for earlier in step.after:
            places = [i for i, key in keys.items() if key == earlier]
            if places and places[0] > index:
                line = source.line(("passes", places[0]))
                yield Fault(("passes", index), f"{step.key()} must stand after {earlier} (line {line})")
        for place, other in passes.items():
            reason = step.conflict(other) if place < index else None
            if reason:
                line = source.line(("passes", place))
                yield Fault(
                    ("passes", index), f"{step.key()} must not stand after {other.key()} (line {line}): {reason}"
                )


def _check_dimensions(document: Document) -> Iterator[Fault]:
    profiles = document.target.profiles
    sized = set(document.model.dimensions).union(*[set.intersection(*map(set, profiles))] if profiles else [])
    for name, dimensions in document.model.inputs.items():
        for index, dimension in enumerate(dimensions):
            if isinstance(dimension, str) and dimension not in sized:
                hint = suggestion(dimension, sized)
                yield Fault(("model", "inputs", name, index), f"model.dimensions has no '{dimension}'{hint}")
    for index, profile in enumerate(profiles):
        for dimension in profile:
            if dimension not in sized:
                hint = suggestion(dimension, sized)
                yield Fault(
                    ("target", "profiles", index, dimension),
                    f"has no sizes in model.dimensions or other profiles{hint}",
                )
