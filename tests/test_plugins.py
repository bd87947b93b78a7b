"""Recipes whose target runs llmc's plugins: the operators stand in the model, and it computes what it did."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from llmc.compiler import compile as run_compile
from llmc.compiler.errors import LlmcError
from llmc.passes.graph import is_own, load_model

RECIPE = """
passes:
  - recipe: optimize
{passes}
target: {{kind: {kind}, plugins: [{plugins}]}}
verify: {{mode: final, samples: 2, budgets: {{cosine: 0.98}}}}
"""
INT8 = """
  - quantize-int8: {calibration: {samples: 2}}
  - convert-fp16
  - fuse-add-rms-norm-quantize
  - fuse-swiglu-quantize
"""
INT4 = """
  - quantize-weights: {method: rtn, block: 32}
  - convert-fp16
  - fuse-dequant-gemv: {symbolic_rows: true}
"""


def compiled(model: Path, place: Path, passes: str, kind: str, plugins: str) -> Counter[str]:
    """llmc's operators in what a compile of the model has made. Random data is all that a test of structure needs."""
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE.format(passes=passes, kind=kind, plugins=plugins), encoding="utf-8")
    run_compile(str(model), recipe, output=place / "out")
    return Counter(node.op for node in load_model(place / "out" / "model.onnx").nodes if is_own(node))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        # A norm before each of attention and MLP in four layers and one at the end, of which the first adds nothing.
        (INT8, {"AddRMSNormQuantize": 8, "SwiGLUQuantize": 4}),
        # Q, K and V merged, O, gate, up and down in four layers, and the last product.
        (INT4, {"DequantGemv": 4 * 5 + 1}),
    ],
)
def test_a_target_with_the_plugin_gets_the_operators(
    tiny_llama: Path, tmp_path: Path, passes: str, expected: dict[str, int]
) -> None:
    assert compiled(tiny_llama, tmp_path, passes, "onnx", "llmc") == expected


@pytest.mark.slow
def test_a_target_without_it_keeps_the_standard_operators(tiny_llama: Path, tmp_path: Path) -> None:
    assert not compiled(tiny_llama, tmp_path, INT8, "onnx", "")


def test_a_target_that_runs_no_plugins_refuses_them(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        LlmcError, match=r"target\.plugins: target onnxruntime runs no plugins: leave target\.plugins out"
    ):
        compiled(tiny_llama, tmp_path, INT8, "onnxruntime", "llmc")
    assert not (tmp_path / "out").exists()
