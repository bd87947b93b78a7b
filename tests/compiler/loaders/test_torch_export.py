"""The ladder: no export is trusted before it gives what torch gives, and failures are told in plain words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter.pattern import RewriteRule

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import torch_export
from llmc.compiler.loaders.mapped import MappedFiles
from llmc.compiler.loaders.signature import Signature
from llmc.compiler.loaders.torch_export import Rung, explain, export
from llmc.compiler.loaders.widened import Widened
from llmc.passes.graph import Graph, Variable

GraphParser = Callable[..., Graph]


class Doubling(torch.nn.Module):
    """y = 2x, with the switches that a transformers model has; knows sdpa unless told otherwise."""

    def __init__(self, attentions: tuple[str, ...] = ("sdpa", "eager")) -> None:
        super().__init__()
        self.attentions = attentions
        self.config = SimpleNamespace(_attn_implementation="default", _experts_implementation="eager")

    def set_attn_implementation(self, name: str) -> None:
        if name not in (*self.attentions, "default"):
            raise ValueError(f"Doubling does not support an attention implementation through {name} yet")
        self.config._attn_implementation = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


SIGNATURE = Signature(
    inputs=(Variable("x", dtype=np.float32, shape=["batch", 3]),),
    outputs=("y",),
    call=lambda forward, x: (forward(x),),
    sample={"batch": 2},
    checks=({"batch": 1}, {"batch": 3}),
)
RIGHT = "(float[batch,3] x) => (float[batch,3] y) { two = Constant<value = float {2.0}>() y = Mul(x, two) }"
INEXACT = RIGHT.replace("2.0", "2.001")
ONE_ROW = (
    "(float[batch,3] x) => (float[1,3] y) { two = Constant<value = float {2.0}>() z = Mul(x, two) y = ReduceMax(z) }"
)
NOT_A_NUMBER = RIGHT.replace("y = Mul(x, two)", "z = Sub(x, x) y = Div(z, z)")
BROKEN = RIGHT.replace("y = Mul(x, two)", "s = Constant<value = int64[1] {3}>() y = Reshape(x, s)")


@pytest.fixture
def exports(parse: GraphParser, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, str]]]:
    """Stand in for the exporter: it gives these graphs one after the other, or raises. Returns what it is asked for."""

    def exports(*results: str | BaseException) -> list[tuple[int, str]]:
        remaining = list(results)
        asked: list[tuple[int, str]] = []

        def stand_in(model: Any, _: Signature, opset: int, _files: Any = None) -> tuple[Graph, frozenset[str]]:
            asked.append((opset, model.config._attn_implementation))
            result = remaining.pop(0)
            if isinstance(result, BaseException):
                raise result
            return parse(result), frozenset({"weight"})

        monkeypatch.setattr(torch_export, "_export", stand_in)
        return asked

    return exports


def exported(model: torch.nn.Module, task: str, opset: int | None = None) -> torch_export.Export:
    return export(model, SIGNATURE, task, opset, lambda _: None, Widened(model, MappedFiles(Path(), []), {}))


def run(task: str = "feature-extraction", opset: int | None = None, **settings: Any) -> torch_export.Export:
    return exported(Doubling(**settings), task, opset)


def test_first_right_export_is_taken(exports: Callable[..., list[tuple[int, str]]]) -> None:
    asked = exports(RIGHT)
    assert run().rung == Rung(23, "sdpa")
    assert asked == [(23, "sdpa")]


@pytest.mark.parametrize("wrong", [INEXACT, ONE_ROW, NOT_A_NUMBER, BROKEN, RuntimeError("no")])
def test_wrong_exports_are_not_trusted(exports: Callable[..., list[tuple[int, str]]], wrong: str | Exception) -> None:
    asked = exports(wrong, wrong, RIGHT)
    assert run().rung == Rung(20, "eager")
    assert asked == [(23, "sdpa"), (24, "sdpa"), (20, "eager")]


def test_decoders_begin_at_24(exports: Callable[..., list[tuple[int, str]]]) -> None:
    asked = exports(INEXACT, RIGHT)
    run("text-generation")
    assert asked == [(24, "sdpa"), (20, "eager")]


@pytest.mark.parametrize(("opset", "order"), [(20, ["eager", "sdpa"]), (24, ["sdpa", "eager"])])
def test_chosen_opset(exports: Callable[..., list[tuple[int, str]]], opset: int, order: list[str]) -> None:
    asked = exports(INEXACT, RIGHT)
    run(opset=opset)
    assert asked == [(opset, attention) for attention in order]


@pytest.mark.parametrize("opset", [17, 25])
def test_opset_that_cannot_be_written(opset: int) -> None:
    with pytest.raises(LlmcError, match=f"at opset 18 to 24, not {opset}"):
        run(opset=opset)


def test_every_rung_is_told_when_none_holds(exports: Callable[..., list[tuple[int, str]]]) -> None:
    exports(INEXACT, ONE_ROW, RuntimeError("first line\nsecond line"))
    with pytest.raises(LlmcError) as caught:
        run()
    assert str(caught.value).splitlines() == [
        "Doubling cannot be exported to ONNX:",
        "  opset 23, sdpa: 'y' differs from torch's by 0.0005 of its largest value for inputs of (1, 3)",
        "  opset 24, sdpa: 'y' is (1, 1) for inputs of (1, 3), torch's is (1, 3)",
        "  opset 20, eager: RuntimeError: first line",
    ]


def test_model_without_that_attention(exports: Callable[..., list[tuple[int, str]]]) -> None:
    asked = exports(RIGHT)
    assert run(attentions=("eager",)).rung == Rung(20, "eager")
    assert asked == [(20, "eager")]


def test_model_is_left_as_it_was(exports: Callable[..., list[tuple[int, str]]]) -> None:
    exports(RuntimeError("no"), RIGHT)
    model = Doubling()
    exported(model, "text-generation")
    assert model.config._attn_implementation == "default"
    assert "forward" not in vars(model)


def test_interrupt_is_not_taken_for_a_failed_rung(exports: Callable[..., list[tuple[int, str]]]) -> None:
    exports(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run()


def test_model_that_does_not_run() -> None:
    class Failing(Doubling):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError(f"needs pixels, not {x.shape[1]} numbers")

    with pytest.raises(LlmcError, match="Failing does not run in torch on x: ValueError: needs pixels, not 3 numbers"):
        exported(Failing(), "feature-extraction")


def test_model_that_gives_nan() -> None:
    class Empty(Doubling):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 0 * 0

    with pytest.raises(LlmcError, match="Empty gives NaN for 'y' in torch itself, as float32"):
        exported(Empty(), "feature-extraction")


class GuardOnDataDependentSymNode(Exception):  # noqa: N818 - torch's name
    pass


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        (
            RuntimeError("No ONNX function found for <OpOverload(op='aten.bincount', overload='default')>. Failure"),
            "the operator aten.bincount has no ONNX form",
        ),
        (GuardOnDataDependentSymNode("Eq(u0, 1)"), "a branch in the model's code depends on the values of tensors"),
        (
            ValueError(
                "Found the following conflicts between user-specified ranges and inferred ranges from model tracing:\n"
                "- Received user-specified dim hint Dim.DYNAMIC(min=None, max=None), but tracing inferred a static "
                "shape of 32 for dimension inputs['pixel_values'].shape[2]."
            ),
            "the model's code fixes axis 2 of 'pixel_values' at 32, the size it was tried with",
        ),
        (KeyError("w"), "KeyError: 'w'"),
    ],
)
def test_root_cause_is_told(root: Exception, reason: str) -> None:
    outer = RuntimeError("Failed to convert the exported program to an ONNX model. This is step 3/3")
    outer.__cause__ = root
    assert explain(outer) == reason


def test_onnxscript_s_rules_find_all_that_they_found_when_they_are_asked_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here those for a Cast to the same type, and for two Transposes in a row."""
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[4,2] x) => (float[4,2] y) {
        a = Cast<to = 1>(x) b = Transpose<perm = [1, 0]>(a) c = Transpose<perm = [1, 0]>(b) d = Neg(c) y = Abs(d) }"""
    asked = 0
    ask = RewriteRule.try_rewrite

    def counted(rule: Any, *arguments: Any, **settings: Any) -> Any:
        nonlocal asked
        asked += 1
        return ask(rule, *arguments, **settings)

    monkeypatch.setattr(RewriteRule, "try_rewrite", counted)
    found = []
    for asking in (nullcontext, torch_export._rules_where_they_fit):
        model, asked = ir.from_onnx_text(text), 0
        with asking():
            optimize_ir(model)
        found.append((ir.to_proto(model), asked))
    (plain, many), (fewer, few) = found
    assert plain == fewer
    assert {node.op_type for node in plain.graph.node} == {"Neg", "Abs"}
    assert 0 < few < many / 2
