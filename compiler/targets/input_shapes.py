"""Optimization profiles: from sizes of symbolic dimensions to shapes of a graph's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmc.compiler.recipe.errors import suggestion
from llmc.compiler.targets import Profile, Range
from llmc.passes.graph import Graph, Tensor, shape_of
from llmc.passes.shapes.dimension import size_at, summands

Shapes = dict[str, tuple[list[int], list[int], list[int]]]
"""Input → its least, optimal and largest shape."""


def profile_problems(graph: Graph, profiles: Sequence[Profile]) -> Iterator[str]:
    """What stops `profiles` from giving every dynamic input of `graph` its sizes: one line each."""
    dimensions = dynamic_dimensions(graph)
    for tensor in graph.inputs:
        shape = shape_of(tensor)
        if shape is None:
            yield f"input '{tensor.name}' has no known rank: give its shape in the model"
        for axis, size in enumerate(shape or ()):
            if size is None:
                yield f"input '{tensor.name}', axis {axis}: is dynamic without a name, so that no profile can size it"
    if dimensions and not profiles:
        names = ", ".join(dimensions)
        yield f"no profile: the inputs have dynamic dimensions ({names}), which need min, opt and max sizes"
    for number, profile in enumerate(profiles, start=1):
        where = f"profile {number}: " if len(profiles) > 1 else "profile: "
        for name, (tensor, axis) in dimensions.items():
            if name not in profile:
                yield f"{where}has no sizes for '{name}' (input '{tensor.name}', axis {axis})"
        for name, sizes in profile.items():
            if name not in dimensions:
                yield f"{where}no input has a dimension '{name}'{suggestion(name, dimensions)}"
            elif not 0 <= sizes.min <= sizes.opt <= sizes.max or sizes.max == 0:
                yield f"{where}'{name}' is {sizes.min}, {sizes.opt}, {sizes.max}, which is not 0 ≤ min ≤ opt ≤ max"


def dynamic_dimensions(graph: Graph) -> dict[str, tuple[Tensor, int]]:
    """Symbolic dimension of the inputs → the first input and axis that have it."""
    found: dict[str, tuple[Tensor, int]] = {}
    for tensor in graph.inputs:
        for axis, size in enumerate(shape_of(tensor) or ()):
            for name in summands(size) if isinstance(size, str) else ():
                if not name.isdecimal():
                    found.setdefault(name, (tensor, axis))
    return found


def input_shapes(graph: Graph, profile: Profile) -> Shapes:
    """The shapes that `profile`, which must have no problems, gives to the dynamic inputs of `graph`."""
    shapes: Shapes = {}
    for tensor in graph.inputs:
        shape = shape_of(tensor) or ()
        if any(isinstance(size, str) for size in shape):
            ranges = [_range(size, profile) for size in shape]
            shapes[tensor.name] = ([r.min for r in ranges], [r.opt for r in ranges], [r.max for r in ranges])
    return shapes


def _range(size: int | str | None, profile: Profile) -> Range:
    if size is None:
        raise ValueError("a dynamic dimension without a name has no sizes")
    at = ({name: getattr(sizes, bound) for name, sizes in profile.items()} for bound in ("min", "opt", "max"))
    return Range(*(size_at(size, sizes) for sizes in at))
