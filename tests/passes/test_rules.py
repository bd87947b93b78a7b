"""Every rule of every pass is proved here: each alternative of its pattern is built, rewritten, run before and after.

A new rule is found by itself; its own test file adds the places where it must leave the graph alone. Its `example`
gives a Weight by its shape or as an array, a Scalar as a number. Arrays of float64 and Python numbers get the type that
the rule is tried in; other arrays and NumPy numbers keep theirs.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, PassResult, discover
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Tensor,
    Variable,
    copy_graph,
    from_model,
    infer_shapes,
    onnx_dtype,
    remove_nodes,
    to_model,
)
from llmc.passes.rewrite import Builder, Rest, Rewrite, RewritePass, Scalar, Weight, apply_rule

TOLERANCE = {
    # Both sides compute in float32 and round a different number of times; 32 roundings of 2^-24 on values of order 1.
    "float32": 32 * 2.0**-24,
    # ONNX Runtime rounds to float16 after each operator of the long form: up to 16 of them, 2^-11 each.
    "float16": 16 * 2.0**-11,
    # The same of bfloat16, whose rounding is 2^-8.
    "bfloat16": 16 * 2.0**-8,
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Variant:
    """What a rule is tried on: 16-bit types round differently, but match as float32 does."""

    dtype: str
    symbolic: bool = False


VARIANTS = [Variant("float32"), Variant("float32", symbolic=True), Variant("float16"), Variant("bfloat16")]


def cases() -> list[Any]:
    return [
        pytest.param(rule, choice, variant, id="-".join([key, rule.name, str(number), variant.dtype, *tail]))
        for key, pass_class in discover().items()
        if issubclass(pass_class, RewritePass)
        for rule in pass_class.rules
        for number, choice in enumerate(rule.alternatives)
        for variant in VARIANTS
        if variant.dtype in rule.dtypes and (rule.symbolic or not variant.symbolic)
        for tail in [["symbolic"] if variant.symbolic else []]
    ]


def build(rule: Rewrite, choice: tuple[int, ...], variant: Variant, opset: int, seed: int) -> Graph:
    """A graph that is the rule's pattern and nothing else, over random shapes and constants."""
    dtype = np.dtype(DTYPES[variant.dtype])
    rng = np.random.default_rng(seed)
    example = rule.example(rng)
    names = iter(range(10_000))
    builder = Builder(opset, lambda wanted: f"{wanted}_{next(names)}", "", choice)
    given: list[Any] = []
    inputs: list[Tensor] = []
    for parameter in rule.parameters:
        value = example[parameter.name]
        if parameter.kind is Weight:
            array = value if isinstance(value, np.ndarray) else rng.standard_normal(value)
            value = Constant(parameter.name, array.astype(dtype) if array.dtype == np.float64 else array)
        elif parameter.kind is Scalar:
            value = Constant(parameter.name, np.asarray(value, dtype=None if isinstance(value, np.generic) else dtype))
        elif parameter.kind is None:
            value = Variable(parameter.name, dtype=dtype, shape=value)
            inputs.append(value)
        elif parameter.kind is Rest:
            value = [Variable(f"{parameter.name}_{i}", dtype=dtype, shape=shape) for i, shape in enumerate(value)]
            inputs.extend(value)
        given.append(value)
    made = rule.pattern(builder, *given)
    outputs = list(made) if isinstance(made, tuple) else [made]
    graph = Graph(nodes=builder.nodes, inputs=inputs, outputs=outputs, opset=opset)
    needed, pending = set(), list(outputs)
    while pending:
        for node in pending.pop().inputs:
            needed.add(id(node))
            pending.extend(node.inputs)
    remove_nodes(graph, [node for node in graph.nodes if id(node) not in needed])  # of options not chosen
    infer_shapes(graph)
    if variant.symbolic:
        for tensor in inputs:
            tensor.shape = [*(f"N{size}" for size in tensor.shape[:1]), *tensor.shape[1:]]
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


def run(graph: Graph, feeds: dict[str, Array]) -> dict[str, Array]:
    """Feeds and results in float32 where the graph has bfloat16, which ONNX Runtime takes between two casts only."""
    bordered = copy_graph(graph)
    for index, tensor in enumerate(bordered.inputs):
        if onnx_dtype(tensor) == onnx.TensorProto.BFLOAT16:
            outside = Variable(tensor.name, np.dtype(np.float32), tensor.shape)
            tensor.name += "/narrow"
            bordered.nodes.insert(0, Node("Cast", tensor.name, {"to": onnx_dtype(tensor)}, [outside], [tensor]))
            bordered.inputs[index] = outside
            feeds = {**feeds, outside.name: feeds[outside.name].astype(np.float32)}
    for index, tensor in enumerate(bordered.outputs):
        if onnx_dtype(tensor) == onnx.TensorProto.BFLOAT16:
            wide = Variable(tensor.name, np.dtype(np.float32), tensor.shape)
            tensor.name += "/narrow"
            bordered.nodes.append(Node("Cast", tensor.name, {"to": onnx_dtype(wide)}, [tensor], [wide]))
            bordered.outputs[index] = wide
    return Session(bordered).run(feeds)


@pytest.mark.parametrize(("rule", "choice", "variant"), cases())
def test_rule_keeps_the_numbers(rule: Rewrite, choice: tuple[int, ...], variant: Variant, random_feeds: Any) -> None:
    # bfloat16 came to the last operators with opset 22.
    newest = max(rule.opset, rule.since, 22 if variant.dtype == "bfloat16" else 13)
    for opset in sorted(n for n in {13, 18, newest} if n == newest or (rule.since <= n and variant.dtype == "float32")):
        seed = zlib.crc32(f"{rule.name}{choice}{opset}".encode())
        graph = build(rule, choice, variant, opset, seed)
        feeds = random_feeds(build(rule, choice, Variant(variant.dtype), opset, seed), seed)
        before = run(graph, feeds)
        fused = copy_graph(graph)
        infer_shapes(fused)
        result = PassResult()
        apply_rule(rule, fused, Context(), result)
        assert len(result.rewrites) == 1, [m.reason for m in result.near_misses]
        assert fused.opset >= rule.opset
        assert [t.name for t in fused.outputs] == [t.name for t in graph.outputs]
        onnx.checker.check_model(to_model(fused), full_check=True)
        assert close(before, run(fused, feeds), TOLERANCE[variant.dtype])


def test_there_are_rules() -> None:
    assert len(cases()) >= 40
