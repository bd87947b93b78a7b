"""Every rule of every pass is proved here: each alternative of its pattern is built, rewritten, and run before and after.

A new rule is found by itself; its own test file adds the places where it must leave the graph alone.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, PassResult, discover
from llmc.passes.graph import Array, Constant, Graph, Tensor, Variable, copy_graph, from_model, infer_shapes, to_model
from llmc.passes.rewrite import Builder, Rewrite, RewritePass, Scalar, Weight, apply_rule

TOLERANCE = {
    # Both sides compute in float32 and round a different number of times; 32 roundings of 2^-24 on values of order 1.
    "float32": 32 * 2.0**-24,
    # ONNX Runtime rounds to float16 after each operator of the long form: up to 16 of them, 2^-11 each.
    "float16": 16 * 2.0**-11,
    "float64": 64 * 2.0**-24,  # literals such as 1.41421356 are float32-exact only in exporters' graphs
}


def rules() -> list[Any]:
    return [
        pytest.param(rule, choice, id=f"{key}-{rule.name}-{number}")
        for key, pass_class in discover().items()
        if issubclass(pass_class, RewritePass)
        for rule in pass_class.rules
        for number, choice in enumerate(rule.alternatives)
    ]


def build(rule: Rewrite, choice: tuple[int, ...], dtype: str, opset: int, seed: int, symbolic: bool) -> Graph:
    """A graph that is the rule's pattern and nothing else, over random shapes and constants."""
    rng = np.random.default_rng(seed)
    example = rule.example(rng)
    names = iter(range(10_000))
    builder = Builder(opset, lambda wanted: f"{wanted}_{next(names)}", "", choice)
    given: list[Any] = []
    inputs: list[Tensor] = []
    for parameter in rule.parameters:
        value = example[parameter.name]
        if parameter.kind is Weight:
            value = Constant(parameter.name, rng.standard_normal(value).astype(dtype))
        elif parameter.kind is Scalar:
            value = Constant(parameter.name, np.asarray(value, dtype=dtype))
        elif parameter.kind is None:
            value = Variable(parameter.name, dtype=np.dtype(dtype), shape=value)
            inputs.append(value)
        given.append(value)
    made = rule.pattern(builder, *given)
    outputs = list(made) if isinstance(made, tuple) else [made]
    graph = Graph(nodes=builder.nodes, inputs=inputs, outputs=outputs, opset=opset)
    graph.cleanup()
    infer_shapes(graph)
    if symbolic:
        for tensor in inputs:
            tensor.shape = ["N", *tensor.shape[1:]]
        for tensor in graph.tensors().values():
            if isinstance(tensor, Variable) and not any(tensor is i for i in inputs):
                tensor.shape = None
    return from_model(to_model(graph))


def close(before: dict[str, Array], after: dict[str, Array], tolerance: float) -> bool:
    for name, expected in before.items():
        wide, found = expected.astype(np.float64), after[name].astype(np.float64)
        if not np.allclose(wide, found, rtol=0, atol=tolerance * max(1.0, np.abs(wide).max())):
            return False
    return True


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("rule", "choice"), rules())
def test_rule_keeps_the_numbers(
    rule: Rewrite, choice: tuple[int, ...], dtype: str, symbolic: bool, random_feeds: Any
) -> None:
    for opset in {13, 18, max(rule.opset, 13)}:
        seed = zlib.crc32(f"{rule.name}{choice}{opset}".encode())
        graph = build(rule, choice, dtype, opset, seed, symbolic)
        before = Session(graph).run(random_feeds(graph, seed))
        fused = copy_graph(graph)
        infer_shapes(fused)
        result = PassResult()
        apply_rule(rule, fused, Context(), result)
        assert len(result.rewrites) == 1, [m.reason for m in result.near_misses]
        assert fused.opset >= rule.opset
        assert [t.name for t in fused.outputs] == [t.name for t in graph.outputs]
        after = Session(fused).run(random_feeds(graph, seed))
        assert close(before, after, TOLERANCE[dtype])


def test_there_are_rules() -> None:
    assert len(rules()) >= 10
