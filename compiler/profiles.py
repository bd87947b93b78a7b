"""Sizes of symbolic dimensions: what the recipe says, what the model allows, what samples have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import numpy as np

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Feeds, Loaded
from llmc.compiler.recipe import Recipe
from llmc.compiler.recipe.errors import suggestion
from llmc.compiler.targets import Profile, Range
from llmc.passes.graph import Graph, constants
from llmc.passes.shapes.dimension import size_at, summands

BATCH = Range(1, 1, 8)
"""Of a dimension whose name says batch, where the recipe gives no sizes."""
OTHER = Range(1, 128, 512)
"""Of any other, cut to what the model allows."""
TIMES_LEAST = 40, 400
"""Best and largest size of a dimension that the model sets a least size for, as multiples of that: of the sound that
wav2vec2 hears, 25 ms at least, these are 1 s and 10 s."""
LARGEST_CORNER = 8
"""How many times the work of the best sizes a generated sample may be."""
LARGEST_WORK = 1 << 36
"""Weights times what is put in (tokens): more takes a generated sample longer than some seconds on two cores."""


def declare_inputs(graph: Graph, recipe: Recipe) -> None:
    """Give the graph's inputs the dimensions that `model.inputs` of the recipe declares. Raises LlmcError."""
    known = {tensor.name: tensor for tensor in graph.inputs}
    for name, dimensions in recipe.model.inputs.items():
        tensor = known.get(name)
        if tensor is None:
            raise LlmcError(
                f"{recipe.where('model', 'inputs', name)}: the model has no input '{name}'{suggestion(name, known)}"
            )
        if tensor.shape is not None and len(tensor.shape) != len(dimensions):
            raise LlmcError(
                f"{recipe.where('model', 'inputs', name)}: input '{name}' has {len(tensor.shape)} dimensions "
                f"{list(tensor.shape)}, the recipe gives {len(dimensions)}"
            )
        for index, (old, new) in enumerate(zip(tensor.shape or dimensions, dimensions, strict=True)):
            if isinstance(old, int) and old != new:
                raise LlmcError(
                    f"{recipe.where('model', 'inputs', name)}: dimension {index} of input '{name}' is fixed at {old}"
                )
        tensor.shape = list(dimensions)


def symbolic_dimensions(graph: Graph) -> list[str]:
    """Names of the symbolic dimensions of the graph's inputs, in order; those in a sum ('past + new') one by one.

    Raises LlmcError for one without a name.
    """
    names: dict[str, None] = {}
    for tensor in graph.inputs:
        if tensor.shape is None:
            raise LlmcError(f"input '{tensor.name}' has no shape; give it one under model.inputs in the recipe")
        for index, size in enumerate(tensor.shape):
            if size is None:
                raise LlmcError(
                    f"dimension {index} of input '{tensor.name}' has neither size nor name; "
                    "name it under model.inputs in the recipe"
                )
            if isinstance(size, str):
                names |= dict.fromkeys(part for part in summands(size) if not part.isdecimal())
    return list(names)


def resolve_profiles(loaded: Loaded, recipe: Recipe) -> tuple[list[Profile], list[str]]:
    """The optimization profiles over exactly the model's dimensions, and a note for each size that was assumed.

    Raises LlmcError for a dimension that the model does not have, or a size that it does not allow.
    """
    names = symbolic_dimensions(loaded.graph)
    profiles: list[Profile] = []
    assumed: dict[str, Range] = {}
    for given in recipe.profiles:
        for name, sizes in given.items():
            place = recipe.where("model", "dimensions", name)
            if name not in names and name in loaded.elsewhere:
                continue
            if name not in names:
                raise LlmcError(f"{place}: the model has no dimension '{name}'{suggestion(name, names)}")
            limit = loaded.limits.get(name)
            if limit is not None and sizes.max > limit:
                raise LlmcError(f"{place}: '{name}' goes up to {sizes.max}, the model allows at most {limit}")
            if sizes.min < loaded.least.get(name, 0):
                raise LlmcError(
                    f"{place}: '{name}' begins at {sizes.min}, the model takes at least {loaded.least[name]}"
                )
        for total, limit in loaded.limits.items():
            best = sum(given[name].opt for name in summands(total) if name in given)
            if best > limit:
                place = recipe.where("model", "dimensions")
                raise LlmcError(f"{place}: {total} is {best} at best, the model allows at most {limit}")
        assumed |= {name: _assumed(name, loaded) for name in names if name not in given}
        profile = {name: given.get(name) or assumed[name] for name in names}
        if profile not in profiles:  # what tells prompts from decoding may be in the other graph of two
            profiles.append(profile)
    notes = [
        f"the recipe gives no sizes for '{name}': built for {sizes.min} to {sizes.max}, best at {sizes.opt}"
        for name, sizes in assumed.items()
    ]
    return profiles, notes


def check_sizes(graph: Graph, samples: Iterable[Feeds], profiles: Sequence[Profile], origin: str) -> None:
    """Raises LlmcError for a sample that no profile covers."""
    for number, sample in enumerate(samples, start=1):
        sizes = sizes_of(graph, sample)
        problems = [
            f"'{name}' is {size}, the profile goes from {profile[name].min} to {profile[name].max}"
            for profile in profiles
            for name, size in sizes.items()
            if not profile[name].min <= size <= profile[name].max
        ]
        covered = any(all(p[name].min <= size <= p[name].max for name, size in sizes.items()) for p in profiles)
        if not covered:
            raise LlmcError(f"{origin}, sample {number}: {problems[0]}; change model.dimensions in the recipe")


def sizes_of(graph: Graph, sample: Feeds) -> dict[str, int]:
    """Symbolic dimension → the size that it has in `sample`. Raises LlmcError where inputs disagree."""
    sizes: dict[str, int] = {}
    sums = []
    for tensor in graph.inputs:
        for name, size in zip(tensor.shape, sample[tensor.name].shape, strict=True):
            if isinstance(name, str) and len(summands(name)) > 1:
                sums.append((name, size, tensor.name))
            elif isinstance(name, str) and sizes.setdefault(name, size) != size:
                raise LlmcError(f"'{name}' is {sizes[name]} in one input and {size} in '{tensor.name}'")
    for name, size, tensor_name in sums:
        if size_at(name, sizes) != size:
            raise LlmcError(f"'{name}' is {size_at(name, sizes)} in other inputs and {size} in '{tensor_name}'")
    return sizes


def generated_sizes(profile: Profile) -> list[dict[str, int]]:
    """Sizes for generated samples: the profile's optimum, and its least."""
    return [{name: sizes.opt for name, sizes in profile.items()}, {name: sizes.min for name, sizes in profile.items()}]


def verified_sizes(profiles: Sequence[Profile], count: int, seed: int = 0) -> list[dict[str, int]]:
    """Sizes of `count` generated samples for verification: of each profile the optimum, the least sizes, each
    dimension at its largest with the others at their least, all at their largest where that is at most
    `LARGEST_CORNER` times the optimum; then sizes in between.
    """
    edges: list[dict[str, int]] = []
    for profile in profiles:
        optimum, least, largest = (
            {name: getattr(sizes, end) for name, sizes in profile.items()} for end in ("opt", "min", "max")
        )
        edges += [optimum, least, *({**least, name: size} for name, size in largest.items())]
        if prod(largest.values()) <= LARGEST_CORNER * prod(max(size, 1) for size in optimum.values()):
            edges.append(largest)
    found = [dict(sizes) for sizes in dict.fromkeys(tuple(edge.items()) for edge in edges)]
    rng = np.random.default_rng(seed)
    while len(found) < count:
        profile = profiles[len(found) % len(profiles)]
        found.append({name: int(rng.integers(sizes.min, sizes.opt + 1)) for name, sizes in profile.items()})
    return found[:count]


def affordable(graph: Graph, profiles: Sequence[Profile], sizes: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """The sizes of generated samples, cut so that one costs at most `LARGEST_WORK` multiplications by weights.

    The largest dimension is halved until that holds, or all are at the least of the profile.
    """
    weights = sum(prod(constant.shape) for constant in constants(graph))
    shapes = [[size for size in tensor.shape or () if isinstance(size, str)] for tensor in graph.inputs]
    found = []
    for given in sizes:
        cut = dict(given)
        least = next(p for p in profiles if all(p[name].min <= size <= p[name].max for name, size in given.items()))
        while max((prod(size_at(size, cut) for size in s) for s in shapes), default=1) * weights > LARGEST_WORK:
            larger = [name for name in cut if cut[name] > max(least[name].min, 1)]
            if not larger:
                break
            name = max(larger, key=lambda n: cut[n])
            cut[name] = max(cut[name] // 2, least[name].min)
        found.append(cut)
    return found


def _assumed(name: str, loaded: Loaded) -> Range:
    limits, smallest = loaded.limits, loaded.least.get(name)
    if "batch" in name.lower():
        return BATCH
    if smallest is not None:
        return Range(smallest, *(smallest * times for times in TIMES_LEAST))
    shared = [limit for total, limit in limits.items() if name in summands(total) and name != total]
    limit = min([*shared, limits.get(name, OTHER.max)])
    least = 0 if name.lower().startswith("past") else OTHER.min
    return Range(least, min(OTHER.opt, limit // 2 if shared else limit), min(OTHER.max, limit))
