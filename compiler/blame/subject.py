"""What is to be looked into: a model and a recipe, evidence of a broken budget, or an artifact and its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llmc.compiler.artifact import MANIFEST, is_artifact
from llmc.compiler.errors import LlmcError
from llmc.compiler.planning import Plan
from llmc.compiler.recipe import Recipe
from llmc.compiler.recipe.sections import AT_LEAST, METRICS


@dataclass(frozen=True)
class Subject:
    """A model and the recipe that it is compiled by, with what is known of them."""

    model: str
    recipe: Recipe
    artifact: Path | None = None

    def check(self, plan: Plan) -> None:
        """Raises LlmcError where the model is not the one that the artifact was made of."""
        if self.artifact is None:
            return
        made_of = json.loads((self.artifact / MANIFEST).read_text(encoding="utf-8"))["source"]
        if made_of["sha256"] != plan.loaded.digest:
            raise LlmcError(
                f"--source {self.model} is not what {self.artifact} was made of: its SHA-256 is {plan.loaded.digest}, "
                f"of '{made_of['name']}' it was {made_of['sha256']}"
            )


def resolve(given: str, recipe: str | None, source: str | None) -> Subject:
    """What the words of a command mean. Raises LlmcError where one is missing.

    `given`: a model; `OUTPUT.failed`, which brings model, recipe and inputs; or an artifact, which brings its recipe,
    where `source` is the model. A `recipe` stands in for theirs.
    """
    folder = Path(given)
    evidence = folder / "repro"
    if (evidence / "recipe.yaml").is_file():
        models = [evidence / name for name in ("loaded.onnx", "before.onnx") if (evidence / name).is_file()]
        if not models:
            raise LlmcError(f"{evidence} has no loaded.onnx: it is not whole")
        chosen = Recipe.load(recipe or evidence / "recipe.yaml")
        return Subject(str(models[0]), chosen.with_values({"verify.inputs": (evidence / "inputs").resolve()}))
    if is_artifact(folder) and (folder / "recipe.yaml").is_file():
        if source is None:
            raise LlmcError(f"{given} is an artifact, which does not hold its source: add --source MODEL")
        return Subject(source, Recipe.load(recipe or folder / "recipe.yaml"), folder)
    if source is not None:
        raise LlmcError(f"--source goes with an artifact; {given} is none: give one of the two")
    if recipe is None:
        raise LlmcError(f"say how {given} is compiled: --recipe R")
    return Subject(given, Recipe.load(recipe))


def budget(metric: str | None, at_least: float | None, at_most: float | None) -> dict[str, float] | None:
    """Metric → limit, None for the recipe's own budgets. Raises LlmcError where the options do not fit together."""
    bounds = {"--at-least": at_least, "--at-most": at_most}
    given = {option: bound for option, bound in bounds.items() if bound is not None}
    if metric is None:
        if given:
            raise LlmcError(f"{next(iter(given))}: of which metric? Give --metric, one of {', '.join(METRICS)}")
        return None
    if metric not in METRICS:
        raise LlmcError(f"--metric {metric} is unknown; there are {', '.join(METRICS)}")
    wanted = "--at-least" if metric in AT_LEAST else "--at-most"
    if list(given) != [wanted]:
        raise LlmcError(f"--metric {metric} goes with {wanted} X, and with no other bound")
    return {metric: given[wanted]}
