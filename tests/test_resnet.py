"""INT8 ResNets of both kinds of block, in TensorRT-RTX: residuals that are int8 in the engine, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler import compile as run_compile
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.recipe import Recipe
from llmc.compiler.report import Report
from llmc.compiler.targets.tensorrt_import import availability

RECIPE = """
model: {dimensions: {batch: [1, 2, 4]}}
passes: [recipe: optimize, quantize-int8: {calibration: {data: samples, samples: 8}}, convert-fp16, eliminate-dead]
target: {kind: tensorrt-rtx, compute_capabilities: [89]}
verify: {inputs: samples, samples: 4, budgets: {cosine: 0.9}}
"""
BLOCKS = {"basic": 3, "bottleneck": 2}
"""Kind of block → residuals of the four that pass no convolution: a bottleneck widens in the first stage too."""


@pytest.fixture(scope="module", params=BLOCKS)
def resnet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A ResNet of two stages of two blocks with random weights, statistics too, and a recipe with samples beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    with quiet():
        import torch
        from transformers import ResNetConfig, ResNetForImageClassification

        torch.manual_seed(0)
        sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
        if request.param == "bottleneck":
            sizes["hidden_sizes"] = [32, 64]
        model = ResNetForImageClassification(ResNetConfig(layer_type=request.param, **sizes)).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for values, low, high in ((module.weight, 0.5, 1), (module.running_var, 0.5, 1.5)):
                    torch.nn.init.uniform_(values, low, high)
                for values in (module.bias, module.running_mean):
                    torch.nn.init.normal_(values, 0, 0.2)
        model.save_pretrained(folder / "model")
    (folder / "samples").mkdir()
    for number, picture in enumerate(np.random.default_rng(0).standard_normal((8, 1, 3, 224, 224))):
        np.savez(folder / "samples" / f"{number:02}.npz", pixel_values=picture.astype(np.float32))
    (folder / "recipe.yaml").write_text(RECIPE)
    return request.param, folder


@pytest.mark.slow
@pytest.mark.skipif(bool(availability("tensorrt-rtx").missing), reason=availability("tensorrt-rtx").missing)
def test_residuals_are_int8_in_the_engine_and_cost_little(resnet: tuple[str, Path]) -> None:
    kind, folder = resnet
    recipe = Recipe.load(folder / "recipe.yaml")
    reports = {
        residuals: run_compile(
            str(folder / "model"),
            recipe.with_values({"passes.quantize-int8.residuals": residuals}),
            folder / f"out-{residuals}",
        )
        for residuals in (True, False)
    }

    adds = [rewrite.node for rewrite in _quantize(reports[True]).rewrites if rewrite.detail.startswith("adds '")]
    assert len(adds) == BLOCKS[kind]
    others = [miss for miss in _quantize(reports[True]).near_misses if miss.rule == "QuantizeInt8"]
    assert len(others) == 4 - BLOCKS[kind]
    assert all("to quantize it here would save nothing" in miss.reason for miss in others)

    for residuals, report in reports.items():
        for name in adds:
            (reads,) = (layer["inputs"] for layer in _layers(report) if name in layer["nodes"])
            assert ("int8" in reads) is residuals, (name, reads)
    written = {residuals: _written(report) for residuals, report in reports.items()}
    # What was written as float16 for the Adds, beside the int8 for the convolutions, is not written any more; nor what
    # the pool before the first block reads, as it gives int8 alone.
    assert written[False].count("float16") - written[True].count("float16") >= BLOCKS[kind]

    errors = {residuals: _quantize(report).numerics[0].relative_l2 for residuals, report in reports.items()}
    assert errors[True] != errors[False]
    # What is rounded for the Adds too is what convolutions read rounded already: at most as much error again.
    assert errors[True] <= 2 * errors[False]


def _quantize(report: Report) -> Any:
    return next(step for step in report.passes if step.key == "quantize-int8")


def _layers(report: Report) -> list[Any]:
    assert report.target is not None
    return list(report.target.layers)


def _written(report: Report) -> list[str]:
    return [dtype for layer in _layers(report) for dtype in layer["outputs"]]
