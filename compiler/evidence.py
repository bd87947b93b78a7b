"""What is kept of a step that broke its budget: graphs, inputs, recipe, and the command that shows it again."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from llmc.compiler.artifact import artifact, write_manifest
from llmc.compiler.data import Samples
from llmc.compiler.pipeline import Step
from llmc.compiler.recipe import Recipe
from llmc.compiler.recipe.source import dump
from llmc.compiler.report import Report, write
from llmc.compiler.versions import llmc_version
from llmc.passes.graph import Structure, from_structure, save_model


def keep_evidence(
    output: Path, recipe: Recipe, step: Step, original: Structure, samples: Samples, report: Report
) -> str:
    """Write the report so far and `output`/repro; return the command that repeats the breach.

    `loaded.onnx` is the graph as loaded, `before.onnx` and `after.onnx` stand around the guilty pass, `inputs/` holds
    the samples, and `recipe.yaml` the passes up to the guilty one.
    """
    document = recipe.document()
    document["passes"] = document["passes"][: step.index]
    document["target"]["kind"] = "onnx"
    document["verify"]["samples"] = max(len(samples), 1)
    with artifact(output) as folder:
        repro = folder / "repro"
        (repro / "inputs").mkdir(parents=True)
        save_model(from_structure(original), repro / "loaded.onnx")
        save_model(from_structure(step.before), repro / "before.onnx")
        save_model(step.graph, repro / "after.onnx")
        for number, sample in enumerate(samples):
            np.savez(repro / "inputs" / f"{number:04d}.npz", **sample)  # type: ignore[arg-type]  # names are inputs
        header = [f"{recipe.name} up to pass {step.index}, {step.key}, which broke the budget"]
        (repro / "recipe.yaml").write_text(dump(document, header=header), encoding="utf-8")
        write(report, folder)
        write_manifest(folder, {"llmc": llmc_version(), "status": "over budget"})
    repro = output / "repro"
    words = ["llmc", "compile", repro / "loaded.onnx", "--recipe", repro / "recipe.yaml"]
    words += ["--verify-inputs", repro / "inputs", "-o", output.with_suffix(".again")]
    return shlex.join(str(word) for word in words)
