"""The recipe `optimize` on the ONNX package's own node tests: every operator, most of its attributes, in ONNX Runtime.

Each model is tried as it is; with every node there twice, for eliminate-common; and with its inputs turned into
constants, for fold-constants, which must then compute what ONNX Runtime computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from llmc.compiler.recipe import Recipe
from llmc.passes.base import Context, Pass
from llmc.passes.graph import from_model, to_model
from llmc.passes.simplify.evaluate import MOVE, RANDOM

NEWEST_OPSET = 26
"""The newest that ONNX Runtime takes; models above it are tried at this one, where their operator mostly exists."""
PASSES = Recipe.load("optimize").passes


@dataclass(frozen=True)
class Case:
    name: str
    model: onnx.ModelProto
    feeds: dict[str, Any]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    made = []
    for case in found:
        for opset in case.model.opset_import:
            if opset.domain == "":
                opset.version = min(opset.version, NEWEST_OPSET)
        case.model.ir_version = min(case.model.ir_version, 11)
        inputs, _ = case.data_sets[0]
        made.append(
            Case(case.name, case.model, {i.name: v for i, v in zip(case.model.graph.input, inputs, strict=True)})
        )
    return made


def as_it_is(case: Case) -> Case:
    return case


def with_every_node_twice(case: Case) -> Case | None:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    copies = []
    for node in case.model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for index, name in enumerate(node.output):
            copy.output[index] = name and f"{name}_again"
        copies.append(copy)
    model.graph.node.extend(copies)
    for info in case.model.graph.output:
        again = model.graph.output.add()
        again.CopyFrom(info)
        again.name = f"{info.name}_again"
    return Case(case.name, model, case.feeds)


def with_constant_inputs(case: Case) -> Case | None:
    """Inputs become initializers, and each output passes through an Identity, so that its node may be folded."""
    values = case.feeds.values()
    if not all(isinstance(v, np.ndarray) and v.dtype.kind in "biufV" for v in values):
        return None
    if any(info.type.WhichOneof("value") != "tensor_type" for info in case.model.graph.output):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    del model.graph.input[:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, name) for name, v in case.feeds.items())
    outputs = {info.name for info in model.graph.output}
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name in outputs:
                node.output[index] = f"{name}_inner"
        for index, name in enumerate(node.input):
            if name in outputs:
                node.input[index] = f"{name}_inner"
    for name in sorted(outputs):
        model.graph.node.append(onnx.helper.make_node("Identity", [f"{name}_inner"], [name]))
    return Case(case.name, model, {})


VARIANTS: tuple[Callable[[Case], Case | None], ...] = (as_it_is, with_every_node_twice, with_constant_inputs)


def run(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def same(found: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, list):
        return len(found) == len(expected) and all(same(f, e, tolerance) for f, e in zip(found, expected, strict=True))
    if not isinstance(expected, np.ndarray):
        return bool(found == expected)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if expected.dtype.kind != "f":
        return bool(np.array_equal(found, expected))
    # Between float16 operators ONNX Runtime keeps float32, or rounds to 2^-11, depending on the nodes around them.
    tolerance = max(tolerance, 2.0**-10 if expected.dtype == np.float16 else 0.0)
    return bool(np.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True))


def tolerance_of(case: Case) -> float:
    """A fused float32 function, or a sum of tens of terms, differs by a few times 2^-24; moved values do not at all."""
    return 0.0 if all(node.op_type in MOVE for node in case.model.graph.node) else 32 * 2.0**-24


def is_random(model: onnx.ModelProto) -> bool:
    """Models that give another result each time; Dropout with all its inputs is one in training mode."""
    nodes = list(from_model(model).nodes)
    return any(node.op in RANDOM or (node.op == "Dropout" and len(node.inputs) == 3) for node in nodes)


def failures(case: Case) -> Iterator[str]:
    """What is wrong after the passes, for each variant of the case that ONNX Runtime runs."""
    for variant in VARIANTS:
        changed = variant(case)
        if changed is None or is_random(changed.model):
            continue
        try:
            expected = run(changed.model, changed.feeds)
        except Exception:  # not a model for ONNX Runtime, as it is
            continue
        label = f"{case.name}, {variant.__name__}"
        try:
            found = run(after(changed.model, PASSES), changed.feeds)
        except Exception as error:
            yield f"{label}: {type(error).__name__}: {error}"
            continue
        if not same(found, expected, tolerance_of(case)):
            yield f"{label}: the results differ"


def after(model: onnx.ModelProto, passes: Iterable[Pass]) -> onnx.ModelProto:
    graph = from_model(model)
    for step in passes:
        step.run(graph, Context())
    changed = to_model(graph)
    assert [o.name for o in changed.graph.output] == [o.name for o in model.graph.output]
    return changed


def test_one_case_of_each_operator(cases: list[Case]) -> None:
    chosen = {case.model.graph.node[-1].op_type: case for case in reversed(cases)}
    assert len(chosen) > 150
    wrong = [line for case in chosen.values() for line in failures(case)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_every_case(cases: list[Case]) -> None:
    wrong = [line for case in cases for line in failures(case)]
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong)
