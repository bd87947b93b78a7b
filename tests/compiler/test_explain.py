from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
import pytest

from llmc.compiler.errors import InternalError, LlmcError
from llmc.compiler.explain import explain
from llmc.compiler.recipe import Recipe
from llmc.passes.base import Pass
from llmc.passes.fuse.fuse_gelu import FuseGelu
from llmc.passes.simplify.fold_constants import FoldConstants

MODEL = (
    '<ir_version: 10, opset_import: ["": 20]> g (float[N,4] x) => (float[N,4] y) '
    "<float s = {1.41421356}, float t = {1.5}, float one = {1}, float h = {0.5}>"
    "{ d = Div(x, s) e = Erf(d) a = Add(e, one) m = Mul(x, a) v = Mul(m, h)"
    "  D = Div(v, t) E = Erf(D) A = Add(E, one) M = Mul(v, A) y = Mul(M, h) }"
)


def test_where_a_pass_fired_and_where_it_came_close(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "m.onnx")
    (found,) = explain(str(tmp_path / "m.onnx"), "fuse-gelu", Recipe.load("optimize"))
    assert "fold-constants" in found.before
    assert [r.rule for r in found.result.rewrites] == ["GeluFromErf"]
    (miss,) = found.result.near_misses
    assert "'t' is 1.5, GeluFromErf needs 1.41421" in miss.reason


@pytest.mark.parametrize("wrong", [FuseGelu, FoldConstants])
def test_a_crash_is_one_message(wrong: type[Pass], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pass itself, and of one that runs before it."""
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "m.onnx")
    monkeypatch.setattr(wrong, "run", lambda *_: 1 / 0)
    with pytest.raises(InternalError, match=f"{wrong.key()}, crashed: ZeroDivisionError: division by zero") as caught:
        explain(str(tmp_path / "m.onnx"), "fuse-gelu", Recipe.load("optimize"))
    assert caught.value.exit_code == 1


def test_a_pass_that_needs_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="quantize-int8 needs activations"):
        explain(str(tmp_path), "quantize-int8", Recipe.load("optimize"))
