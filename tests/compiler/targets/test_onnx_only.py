"""The graph alone: held against the ONNX standard, weights beside it or inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from llmc.compiler.errors import TargetError
from llmc.compiler.targets import BuildRequest, Range
from llmc.compiler.targets.onnx_only import OnnxOnly
from llmc.passes.graph import save_model

TARGET = OnnxOnly()
REQUEST = BuildRequest([{"n": Range(1, 2, 4)}])
ADD = "(float[n,2] x) => (float[n,2] y) <float[2] w = {1.0, 2.0}> { y = Add(x, w) }"


@pytest.mark.parametrize("inline_below", [0, 1 << 20])
def test_a_good_model_passes(inline_below: int, parse: Any, tmp_path: Path) -> None:
    graph = parse(ADD)
    save_model(graph, tmp_path / "model.onnx", inline_below=inline_below)
    assert TARGET.check(graph, REQUEST) == []
    built = TARGET.build(tmp_path / "model.onnx", tmp_path, REQUEST, lambda _: None)
    assert built.files == []
    assert built.facts == {"checker": "onnx", "checker_version": onnx.__version__}


def test_check_looks_at_the_profiles(parse: Any) -> None:
    assert TARGET.check(parse(ADD), BuildRequest([{}])) == ["profile: has no sizes for 'n' (input 'x', axis 0)"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda node: node.attribute.add(name="axis", type=onnx.AttributeProto.INT, i=1),
            "Unrecognized attribute: axis",
        ),
        (lambda node: node.input.__setitem__(1, "gone"), "gone"),
    ],
)
def test_a_model_that_breaks_the_standard_is_a_target_error(
    break_it: Any, message: str, parse: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    save_model(parse(ADD), path)
    model = onnx.load(path)
    break_it(model.graph.node[0])
    onnx.save(model, path)
    with pytest.raises(TargetError, match=rf"model\.onnx breaks the ONNX standard: .*{message}") as error:
        TARGET.build(path, tmp_path, REQUEST, lambda _: None)
    assert "\n" not in str(error.value)
