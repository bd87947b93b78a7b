"""The smallest part of a graph that still shows what a rewrite did, as files that need only llmc to run."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmc.compiler.blame.growth import differs
from llmc.compiler.blame.region import Difference
from llmc.compiler.blame.report import Guilty, Reproducer, Reproduction, TensorError
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Feeds
from llmc.compiler.loaders.onnx_file import load_onnx
from llmc.compiler.recipe import Recipe
from llmc.compiler.recipe.source import dump
from llmc.compiler.report import OutputNumerics
from llmc.compiler.session import Session
from llmc.compiler.verification import breaches, compare
from llmc.passes.graph import Array, Graph, numpy_dtype, onnx_dtype, save_model, shape_of

ABOUT = "reproducer.json"


@dataclass
class Part:
    """The part before and after the rewrite, what goes in, and what must come out."""

    before: Graph
    after: Graph
    inputs: dict[str, Array]
    expected: dict[str, Array]
    budget: dict[str, float]
    same_budget: bool


def smallest_part(
    before: Graph, after: Graph, sample: Feeds, errors: Sequence[TensorError], budget: Mapping[str, float]
) -> Part | None:
    """The part up to the first tensor on which the rewrite alone breaks `budget`.

    Where it breaks it on none (it only added to what others did), the part up to the first tensor that it changed,
    with half of that change as the budget. None where what changed leads to no tensor that both graphs have.
    """
    difference = Difference(before, after)
    reachable = [error for error in errors if differs(error) and error.tensor in difference.touched]
    over = [error for error in reachable if breaches([_numerics(error)], budget)]
    for error in (*over[:3], *reachable[:3]):
        part = _cut(difference, sample, error.tensor)
        (numerics,) = _measure(part)
        if error in over and breaches([numerics], budget):
            part.budget, part.same_budget = dict(budget), True
            return part
        if not math.isfinite(numerics.relative_l2 or 0.0) or numerics.relative_l2:
            part.budget = {"relative_l2": float(numerics.relative_l2 or 0.0) / 2 if numerics.finite else 1.0}
            return part
    return None


def _numerics(error: TensorError) -> OutputNumerics:
    relative = error.relative_l2
    decibels = -20 * math.log10(relative) if error.finite and relative and relative < math.inf else None
    values = error.model_dump(include={"relative_l2", "max_abs", "cosine", "finite"})
    return OutputNumerics(output=error.tensor, sqnr_db=decibels, **values)


def _cut(difference: Difference, sample: Feeds, output: str) -> Part:
    before, after = difference.part(output)
    names = [tensor.name for tensor in before.inputs]
    given = {name: sample[name] for name in names if name in sample}
    computed = [name for name in names if name not in sample]
    values = Session(difference.before, computed).run(sample, computed) if computed else {}
    inputs = {**given, **values}
    for graph in (before, after):
        _name_sizes(graph, inputs)
    return Part(before, after, inputs, run_part(before, inputs), {}, False)


def _name_sizes(graph: Graph, values: Mapping[str, Array]) -> None:
    """A name for each size that has none, and a rank where it is not known: what files and profiles are made with."""
    for tensor in (*graph.inputs, *graph.outputs):
        shape = shape_of(tensor)
        if shape is None and tensor.name in values:
            shape = (None,) * values[tensor.name].ndim
        if shape is not None:
            tensor.shape = [f"{tensor.name}_{axis}" if size is None else size for axis, size in enumerate(shape)]


def run_part(graph: Graph, inputs: Feeds) -> dict[str, Array]:
    """Run a part on inputs of the other one, whose types may be wider."""
    dtypes = {tensor.name: numpy_dtype(onnx_dtype(tensor)) for tensor in graph.inputs}
    return Session(graph).run({name: inputs[name].astype(dtype) for name, dtype in dtypes.items()})


def _measure(part: Part) -> list[OutputNumerics]:
    return compare([(part.expected, run_part(part.after, part.inputs))])


# Files


def write_part(part: Part, folder: Path, place: Path, guilty: Guilty, recipe: Recipe, size: int) -> Reproducer:
    """Write the part into `folder`, which will be called `place`; `size` is the number of nodes of the whole graph."""
    for name, values in (("inputs", part.inputs), ("expected", part.expected)):
        (folder / name).mkdir(parents=True)
        np.savez(folder / name / "0000.npz", **{key: _plain(value) for key, value in values.items()})  # type: ignore[arg-type]
    save_model(part.before, folder / "before.onnx")
    save_model(part.after, folder / "after.onnx")
    header = [f"the pass that did rewrite {guilty.number} of {recipe.name}, on before.onnx alone"]
    (folder / "recipe.yaml").write_text(dump(_recipe(part, guilty, recipe), header=header), encoding="utf-8")
    again = ["llmc", "compile", place / "before.onnx", "--recipe", place / "recipe.yaml"]
    again += ["--verify-inputs", place / "inputs", "-o", place.with_name(f"{place.name}.again")]
    if hasattr(recipe.passes[guilty.pass_index - 1], "calibration"):
        again[5:5] = ["--calibration", place / "inputs"]
    about = Reproducer(
        folder=str(place),
        nodes_before=len(part.before.nodes),
        nodes_after=len(part.after.nodes),
        nodes_of_graph=size,
        inputs=list(part.inputs),
        output=part.before.outputs[0].name,
        budget=part.budget,
        same_budget=part.same_budget,
        command=shlex.join(["llmc", "reproduce", str(place)]),
        again=shlex.join(map(str, again)),
    )
    (folder / ABOUT).write_text(
        json.dumps({"guilty": guilty.model_dump(mode="json"), **about.model_dump(mode="json")}, indent=2) + "\n",
        encoding="utf-8",
    )
    (folder / "README.md").write_text(_readme(about, guilty), encoding="utf-8")
    return about


def _plain(value: Array) -> Array:
    """In a type that NumPy's files know."""
    return value if value.dtype.isbuiltin == 1 else value.astype(np.float32)


def _recipe(part: Part, guilty: Guilty, recipe: Recipe) -> dict[str, object]:
    document = recipe.document()
    step = document["passes"][guilty.pass_index - 1]
    if isinstance(step, dict) and "calibration" in step[guilty.key]:
        section = step[guilty.key]["calibration"]
        section |= dict.fromkeys({"data", "statistics"} & section.keys())
        step[guilty.key].get("judge", {}).update(data=None)
    sizes: dict[str, int] = {}
    for tensor in part.before.inputs:
        named = zip(shape_of(tensor) or (), part.inputs[tensor.name].shape, strict=True)
        sizes.update((name, size) for name, size in named if isinstance(name, str))
    document["model"] |= {"task": None, "opset": None, "inputs": {}, "dimensions": sizes}
    document["target"] = {"kind": "onnx"}
    verify = document["verify"]
    document["verify"] = {"samples": 1, "metrics": verify["metrics"], "budgets": part.budget}
    document["passes"] = [step]
    return document


def _readme(about: Reproducer, guilty: Guilty) -> str:
    bounds = ", ".join(f"{metric} {bound:g}" for metric, bound in about.budget.items())
    what = (
        "breaks the budget"
        if about.same_budget
        else "shows half of the difference that it makes (alone, within budget)"
    )
    return f"""# Rewrite {guilty.number}: {guilty.rule} at '{guilty.node}'

`{guilty.key}`, pass {guilty.pass_index}, made `after.onnx` of `before.onnx`. On `inputs/`, '{about.output}' of
`after.onnx` {what}, {bounds}; `before.onnx` makes what is in `expected/`.

```sh
{about.command}
```

compares the two again; exit code 3 where they differ as they did, 0 where they do not.

```sh
{about.again}
```

lets the pass of this llmc do it anew; exit code 3 where it still breaks the budget, 0 where it is mended.
"""


# Again


def reproduce(folder: Path) -> Reproduction:
    """Run both graphs of a reproducer again. Raises LlmcError where a file is missing or does not fit."""
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        guilty = Guilty.model_validate(found.pop("guilty"))
        about = Reproducer.model_validate(found)
        inputs, expected = (_read(folder / name / "0000.npz") for name in ("inputs", "expected"))
    except (OSError, ValueError, KeyError) as error:
        raise LlmcError(
            f"{folder} is no reproducer: {error}; give the folder 'reproducer' that `llmc bisect` wrote"
        ) from error
    before, after = (load_onnx(folder / name).graph for name in ("before.onnx", "after.onnx"))
    missing = [tensor.name for graph in (before, after) for tensor in graph.inputs if tensor.name not in inputs]
    if missing:
        raise LlmcError(f"{folder / 'inputs'} has no array '{missing[0]}'")
    now = {name: _plain(value) for name, value in run_part(before, inputs).items()}
    (same,) = compare([(expected, now)])
    if breaches([same], about.budget):
        raise LlmcError(f"{folder}: before.onnx does not make what is in expected/: the files were changed")
    numerics = compare([(expected, run_part(after, inputs))])
    return Reproduction(about=about, guilty=guilty, numerics=numerics, breaches=breaches(numerics, about.budget))


def _read(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(_arrays(archive))


def _arrays(archive: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    for name in archive:
        yield name, archive[name]
