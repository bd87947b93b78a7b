"""The pattern language: what matches, what stops a match, and what the user hears about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.passes.base import Context, PassResult
from llmc.passes.graph import Graph, Variable, infer_shapes
from llmc.passes.match import Matcher
from llmc.passes.rewrite import Attribute, Attributes, Builder, Rest, Rewrite, Scalar, Weight, apply_rule


def apply(rule: Rewrite, graph: Graph) -> PassResult:
    result = PassResult()
    infer_shapes(graph)
    apply_rule(rule, graph, Context(), result)
    return result


def reasons(rule: Rewrite, graph: Graph) -> list[str]:
    result = apply(rule, graph)
    assert result.rewrites == []
    return [miss.reason for miss in result.near_misses]


class ReluOfConv(Rewrite):
    def pattern(self, op: Any, x: Any, weight: Weight, bias: Any, attributes: Attributes) -> Any:
        return op.Relu(op.Conv(x, weight, op.optional(bias), others=attributes))

    def replace(self, op: Any, x: Any, weight: Any, bias: Any, attributes: Any) -> Any:
        return op.Conv(x, weight, bias, others=attributes)


class DoubledClip(Rewrite):
    def pattern(self, op: Any, x: Any, low: Attribute) -> Any:
        return op.Mul(op.Clip(x, min=low), 2.0)

    def replace(self, op: Any, x: Any) -> Any:
        return op.Relu(x)


class ScaledTwice(Rewrite):
    def pattern(self, op: Any, x: Any, first: Scalar, second: Scalar) -> Any:
        return op.Mul(op.Mul(x, first), second)

    def check(self, second: Any) -> str | None:
        return None if second > 0 else f"{second:.6g} is not above zero"

    def replace(self, op: Any, x: Any, second: Any, first: Any) -> Any:
        return op.Mul(x, first * second)


class ReshapedBack(Rewrite):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.Reshape(op.Abs(x), op.Shape(x))

    def replace(self, op: Any, x: Any) -> Any:
        return op.Abs(x)


class TanhAdded(Rewrite):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.Add(x, op.Tanh(x))

    def replace(self, op: Any, x: Any) -> Any:
        return op.Tanh(x)


CONV = "(float[1,1,3,3] x) => (float[1,1,A,B] y) <float[1,1,1,1] w = {2}, float[1] b = {1}>"


def test_attributes_are_bound_and_set_again_as_they_are(parse: Any) -> None:
    graph = parse(CONV + "{ c = Conv<strides=[2,1], pads=[1,0,1,0]>(x, w) y = Relu(c) }")
    assert len(apply(ReluOfConv(), graph).rewrites) == 1
    assert graph.nodes[0].attrs == {"strides": [2, 1], "pads": [1, 0, 1, 0]}


def test_an_optional_input_that_is_there_is_bound(parse: Any) -> None:
    graph = parse(CONV + "{ c = Conv(x, w, b) y = Relu(c) }")
    apply(ReluOfConv(), graph)
    assert [t.name for t in graph.nodes[0].inputs] == ["x", "w", "b"]


def test_an_optional_input_is_never_the_reason(parse: Any) -> None:
    graph = parse(CONV + "{ u = Abs(w) c = Conv(x, u) y = Relu(c) }")
    assert reasons(ReluOfConv(), graph) == ["'u' is not a constant"]


def test_a_bound_that_is_computed_is_no_attribute(parse: Any) -> None:
    graph = parse("(float[N] x, float z) => (float[N] y) <float two = {2}> { c = Clip(x, z) y = Mul(c, two) }")
    assert reasons(DoubledClip(), graph) == ["Clip 'c' computes its min"]


@pytest.mark.parametrize(("opset", "text"), [(10, "Clip<min=0.0>(x)"), (20, "Clip(x, zero)")])
def test_an_attribute_that_became_an_input_matches_in_both_forms(opset: int, text: str, parse: Any) -> None:
    head = "(float[N] x) => (float[N] y) <float two = {2}, float zero = {0}>"
    graph = parse(f"{head} {{ c = {text} y = Mul(c, two) }}", opset=opset)
    assert len(apply(DoubledClip(), graph).rewrites) == 1


def test_check_and_replace_get_what_they_name(parse: Any) -> None:
    text = "(float[N] x) => (float[N] y) <float a = {{3}}, float b = {{{b}}}> {{ m = Mul(x, a) y = Mul(m, b) }}"
    graph = parse(text.format(b=2))
    apply(ScaledTwice(), graph)
    assert graph.nodes[0].inputs[1].values == 6
    assert "-2 is not above zero" in reasons(ScaledTwice(), parse(text.format(b=-2)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1)])
def test_a_constant_of_one_element_must_not_add_axes(shape: tuple[int, ...], parse: Any) -> None:
    wide, made = (",".join(map(str, sizes)) for sizes in (shape, (*shape[1:], 4)))
    graph = parse(
        f"(float[4] x) => (float[{made}] y) <float[{wide}] a = {{3}}, float b = {{2}}> "
        "{ m = Mul(x, a) y = Mul(m, b) }"
    )
    reason = f"'a' has shape {list(shape)}, and may add axes to what Mul 'm' makes"
    assert reason in reasons(ScaledTwice(), graph)


def test_a_shape_that_others_read_stays(parse: Any) -> None:
    graph = parse(
        "(float[N] x) => (float[N] y, int64[1] z) { a = Abs(x) s = Shape(x) y = Reshape(a, s) z = Identity(s) }"
    )
    assert len(apply(ReshapedBack(), graph).rewrites) == 1
    assert sorted(node.op for node in graph.nodes) == ["Abs", "Identity", "Shape"]


def test_a_shape_that_nothing_else_reads_goes(parse: Any) -> None:
    graph = parse("(float[N] x) => (float[N] y) { a = Abs(x) s = Shape(x) y = Reshape(a, s) }")
    apply(ReshapedBack(), graph)
    assert [node.op for node in graph.nodes] == ["Abs"]


def test_a_sum_of_two_is_an_add(parse: Any) -> None:
    for text, count in (("Sum(t, x)", 1), ("Sum(t, x, x)", 0)):
        graph = parse(f"(float[N] x) => (float[N] y) {{ t = Tanh(x) y = {text} }}")
        assert len(apply(TanhAdded(), graph).rewrites) == count


def test_shapes_are_known_inside_subgraphs(parse: Any) -> None:
    graph = parse(
        "(bool c, float[2,4] x) => (float[2,4] y) { y = If (c) <then_branch = t () => (float[2,4] ty) "
        "{ a = Abs(x) ty = Neg(a) }, else_branch = f () => (float[2,4] fy) { fy = Identity(x) }> }"
    )
    infer_shapes(graph)
    assert graph.nodes[0].attrs["then_branch"].nodes[0].outputs[0].shape == [2, 4]


def test_options_that_share_no_operator_are_a_mistake() -> None:
    class Unrelated(TanhAdded):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.either(op.Tanh(x), op.Erf(x))

    with pytest.raises(TypeError, match="Unrelated: the options of its `either` share no operator"):
        _ = Unrelated().heart


def test_the_builder_types_what_it_makes() -> None:
    names = iter(range(99))
    op = Builder(20, lambda wanted: f"{wanted}{next(names)}", "")
    half = Variable("x", np.dtype(np.float16), [2])
    assert op.Cast(half, to=1).dtype == np.float32
    assert op.Shape(half).dtype == np.int64
    clipped = op.Clip(half, min=0.0, max=None)
    assert [t.name == "" or t.dtype for t in clipped.inputs[0].inputs] == [np.float16, np.float16]
    padded = op.Pad(half, 1.0, pads=[1, 1])
    assert [t.dtype for t in padded.inputs[0].inputs] == [np.float16, np.int64, np.float16]


def test_a_rule_is_tried_only_where_its_heart_is(parse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    at = Matcher.at
    monkeypatch.setattr(Matcher, "at", lambda self, node: tried.append(node.name) or at(self, node))  # type: ignore[func-returns-value]
    adds = " ".join(f"a{i + 1} = Add(a{i}, x)" for i in range(100))
    graph = parse(f"(float[N] x) => (float[N] y, float[N] z) {{ a0 = Abs(x) {adds} z = Tanh(a100) y = Add(a100, z) }}")
    assert reasons(TanhAdded(), graph) == ["'z', inside the pattern, is an output of the graph"]
    assert tried == ["y"]


def test_rest_takes_every_input(parse: Any) -> None:
    class FirstOfMany(Rewrite):
        def pattern(self, op: Any, tensors: Rest) -> Any:
            return op.Concat(tensors, axis=0)

        def replace(self, op: Any, tensors: Any) -> Any:
            return op.Concat(tensors[::-1], axis=0)

    graph = parse("(float[1] a, float[1] b, float[1] c) => (float[3] y) { y = Concat<axis=0>(a, b, c) }")
    apply(FirstOfMany(), graph)
    assert [t.name for t in graph.nodes[0].inputs] == ["c", "b", "a"]
