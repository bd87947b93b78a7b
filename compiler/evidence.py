"""What is kept of a step that failed: graphs, inputs, recipe, and the command that shows it again."""

from __future__ import annotations

import shlex
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmc.compiler.artifact import artifact, write_manifest
from llmc.compiler.data import Samples
from llmc.compiler.errors import InternalError
from llmc.compiler.pipeline import PassCrash, Step
from llmc.compiler.recipe import Recipe
from llmc.compiler.recipe.source import dump
from llmc.compiler.report import Report, write
from llmc.compiler.targets import TargetKind
from llmc.compiler.versions import llmc_version
from llmc.passes.graph import Graph, Structure, from_structure, save_model


@dataclass(frozen=True)
class Given:
    """What a compile was run with, beside its recipe."""

    verification: Samples
    calibration: Samples | None = None
    """Of the failed step, where it calibrates."""
    tokenizer: Path | None = None
    processor: Path | None = None
    judging: Samples | None = None
    """Of the failed step, where it judges what it does on data of its own."""


def evidence_place(output: Path) -> Path:
    """The directory beside `output` that evidence goes to."""
    return output.with_name(f"{output.name}.failed")


def keep_breach(output: Path, recipe: Recipe, step: Step, original: Structure, given: Given, report: Report) -> str:
    """Write the report so far and `output`/repro; return the command that repeats the breach of a budget.

    `loaded.onnx` is the graph as loaded, `before.onnx` and `after.onnx` stand around the guilty pass, `inputs/` holds
    the samples, and `recipe.yaml` the passes up to the guilty one.
    """
    header = f"{recipe.name} up to pass {step.index}, {step.key}, which broke the budget"
    with _evidence(output, report) as repro:
        save_model(from_structure(original), repro / "loaded.onnx")
        save_model(from_structure(step.before), repro / "before.onnx")
        save_model(step.graph, repro / "after.onnx")
        _write_samples(given.verification, repro / "inputs")
        _write_recipe(recipe, slice(step.index), given, header, repro)
    return _command(output, "loaded.onnx", *_tokenizer(given))


def keep_task(output: Path, recipe: Recipe, original: Structure, final: Graph, given: Given, report: Report) -> str:
    """Write the report and `output`/repro; return the command that measures the task, and loses too much, again.

    `loaded.onnx` is the graph as loaded, `final.onnx` the one after the last pass; the labelled data stands beside
    `recipe.yaml`, which has all passes.
    """
    section = recipe.verify.task
    assert section is not None
    data = Path(f"labelled{section.data.suffix}")
    with _evidence(output, report) as repro:
        save_model(from_structure(original), repro / "loaded.onnx")
        save_model(final, repro / "final.onnx")
        _write_samples(given.verification, repro / "inputs")
        shutil.copyfile(section.data, repro / data)
        verify = recipe.verify.model_copy(update={"task": section.model_copy(update={"data": data})})
        header = f"{recipe.name}, which lost too much of the task's {section.metric}"
        _write_recipe(replace(recipe, verify=verify), slice(None), given, header, repro)
    return _command(output, "loaded.onnx", *_tokenizer(given))


def keep_fallback(output: Path, recipe: Recipe, original: Structure, final: Graph, given: Given, report: Report) -> str:
    """Write the report and `output`/repro; return the command that builds with the wrong precision again.

    `loaded.onnx` is the graph as loaded, `final.onnx` the one that the target was given, `recipe.yaml` the recipe.
    """
    with _evidence(output, report) as repro:
        save_model(from_structure(original), repro / "loaded.onnx")
        save_model(final, repro / "final.onnx")
        _write_samples(given.verification, repro / "inputs")
        header = f"{recipe.name}, which left layers in another precision than it asks for"
        _write_recipe(recipe, slice(None), given, header, repro, kind=recipe.target.kind)
    return _command(output, "loaded.onnx", *_tokenizer(given))


def _tokenizer(given: Given) -> list[object]:
    """The option, where calibration data of the recipe may be text."""
    return ["--tokenizer", given.tokenizer] if given.tokenizer else []


def crash_error(output: Path, recipe: Recipe, crash: PassCrash, given: Given, report: Report | None) -> InternalError:
    """The error to end with, once the evidence is kept beside `output`. Raises the crash where it cannot be kept."""
    evidence = evidence_place(output)
    try:
        command = keep_crash(evidence, recipe, crash, given, report)
    except Exception:  # what matters is the crash: its traceback goes to whoever called
        raise crash from crash.__cause__
    return InternalError(
        f"{crash}.\nThis is a bug of llmc. The graph before the pass and the traceback are in "
        f"{evidence / 'repro'}; to see it again:\n  {command}"
    )


def keep_crash(output: Path, recipe: Recipe, crash: PassCrash, given: Given, report: Report | None) -> str:
    """Write the report so far, of a compile, and `output`/repro; return the command that repeats the crash.

    `before.onnx` is the graph that the pass was given, `recipe.yaml` has this pass alone, `traceback.txt` is where it
    went wrong; `inputs/`, `calibration/` and `judging/` hold the samples.
    """
    step = crash.step
    only = slice(step.index - 1, step.index)
    words: list[object] = []
    with _evidence(output, report) as repro:
        save_model(from_structure(step.before), repro / "before.onnx")
        _write_samples(given.verification, repro / "inputs")
        if given.calibration is not None and hasattr(recipe.passes[step.index - 1], "calibration"):
            _write_samples(given.calibration, repro / "calibration")
            words += ["--calibration", output / "repro/calibration"]
        if given.judging is not None:
            _write_samples(given.judging, repro / "judging")
            words += ["--set", f"passes.{step.key}.judge.data={output / 'repro/judging'}"]
        _write_recipe(recipe, only, given, f"the pass of {recipe.name} that crashed: {step.key}", repro)
        (repro / "traceback.txt").write_text("".join(traceback.format_exception(crash)), encoding="utf-8")
    if step.stop_after is not None:
        words += ["--stop-after-rewrite", step.stop_after - step.rewrites_before]
    return _command(output, "before.onnx", *words)


@contextmanager
def _evidence(output: Path, report: Report | None) -> Iterator[Path]:
    """The folder 'repro' to fill; a manifest stands beside it, and the report; without one, a pass crashed."""
    with artifact(output) as folder:
        repro = folder / "repro"
        repro.mkdir()
        yield repro
        if report is not None:
            write(report, folder)
        write_manifest(folder, {"llmc": llmc_version(), "status": report.status if report else "crashed"})


def _write_samples(samples: Samples, folder: Path) -> None:
    folder.mkdir()
    for number, sample in enumerate(samples):
        np.savez(folder / f"{number:04d}.npz", **sample)  # type: ignore[arg-type]  # names are inputs


def _write_recipe(
    recipe: Recipe, passes: slice, given: Given, header: str, repro: Path, kind: TargetKind = "onnx"
) -> None:
    """The recipe with these of its passes alone, verified on the samples given, and with another target."""
    document = recipe.document()
    document["passes"] = document["passes"][passes]
    for step in document["passes"]:  # earlier statistics hold for the source alone, not for the graphs kept here
        parameters = next(iter(step.values())) if isinstance(step, dict) else {}
        if "statistics" in parameters.get("calibration", {}):
            parameters["calibration"]["statistics"] = None
    document["model"]["half"] = None  # what is kept is one graph
    document["model"]["processor"] = str(given.processor) if given.processor else None
    document["target"] |= {"kind": kind, "link_weights": False}
    document["verify"]["samples"] = max(len(given.verification), 1)
    keys = {step.key() for step in recipe.passes[passes]}
    budgets = document["verify"]["pass_budgets"]
    document["verify"]["pass_budgets"] = {key: budgets[key] for key in budgets if key in keys}
    (repro / "recipe.yaml").write_text(dump(document, header=[header]), encoding="utf-8")


def _command(output: Path, model: str, *words: object) -> str:
    repro = output / "repro"
    command = ["llmc", "compile", repro / model, "--recipe", repro / "recipe.yaml"]
    command += ["--verify-inputs", repro / "inputs", *words, "-o", output.with_suffix(".again")]
    return shlex.join(str(word) for word in command)
