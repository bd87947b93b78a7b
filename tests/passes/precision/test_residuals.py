"""Residual Adds that read int8: where, where not, and what that does to the result."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, LlmcError
from llmc.passes.graph import Constant, copy_graph, load_values
from llmc.passes.precision.quantize_int8 import QuantizeInt8

PAD = "pads = [1, 1, 1, 1]"
HEAD = "(float[B,4,6,6] x, float[4,4,3,3] w, float[4,4,3,3] v, float[4,4,1,1] u) => (float[B,4,6,6] y) "
BLOCK = f"h = Relu(x) a = Conv<{PAD}>(h, w) b = Relu(a) c = Conv<{PAD}>(b, v)"
SECOND = f"d = Relu(s) e = Conv<{PAD}>(d, w) f = Relu(e) g = Conv<{PAD}>(f, v) t = Add(g, d) y = Relu(t)"

# graph, the Adds that read int8, and at which position
FIRES = {
    "a basic block": (f"{{ {BLOCK} s = Add(c, h) y = Relu(s) }}", {"s": 1}),
    "the other way round": (f"{{ {BLOCK} s = Add(h, c) y = Relu(s) }}", {"s": 0}),
    "as a Sum of two": (f"{{ {BLOCK} s = Sum(c, h) y = Relu(s) }}", {"s": 1}),
    "two blocks": (f"{{ {BLOCK} s = Add(c, h) {SECOND} }}", {"s": 1, "t": 1}),
    "a bottleneck that ends linearly": (
        f"{{ i = Conv(x, u) a = Conv(i, u) b = Clip(a) c = Conv<{PAD}>(b, w) y = Add(c, i) }}",
        {"y": 1},
    ),
    "in a backbone before attention": (
        f"{{ {BLOCK} s = Add(c, h) q = Transpose<perm = [0, 1, 3, 2]>(s) y = MatMul(s, q) }}",
        {"s": 1},
    ),
}
# graph, parameters, what the near miss of 's' says; None: there is none
LEAVES_ALONE = {
    "a shortcut through a convolution": (
        f"{{ {BLOCK} r = Conv(h, u) s = Add(c, r) y = Relu(s) }}",
        {},
        "no layer before it reads 'r' or 'c' as int8: to quantize it here would save nothing",
    ),
    "what nothing quantizes": (
        f"{{ {BLOCK} r = Sigmoid(x) s = Add(c, r) y = Relu(s) }}",
        {},
        "no layer before it reads 'r' as int8: to quantize it here would save nothing",
    ),
    "what is quantized after it only": (
        f"{{ a = Conv<{PAD}>(x, w) h = Sigmoid(x) s = Add(a, h) z = Conv(h, u) y = Add(z, s) }}",
        {},
        "no layer before it reads 'h' as int8: to quantize it here would save nothing",
    ),
    "a convolution that stays float": (
        f"{{ {BLOCK} s = Add(c, h) y = Relu(s) }}",
        {"exclude": ["c"]},
        "its convolution 'c' is not quantized",
    ),
    "an Add that is excluded": (
        f"{{ {BLOCK} s = Add(c, h) y = Relu(s) }}",
        {"exclude": ["s"]},
        "excluded by 's'",
    ),
    "an operator that is not included": (
        f"{{ {BLOCK} s = Add(c, h) y = Relu(s) }}",
        {"include": ["Conv"]},
        "no pattern includes it",
    ),
    "behind attention": (
        f"{{ {BLOCK} q = MatMul(c, b) r = Conv(q, u) k = Relu(q) l = Conv(k, u) s = Add(l, q) y = Relu(s) }}",
        {},
        "it stands behind 'q': only residuals of convolutional nets are quantized",
    ),
    "a bias": ("{ c = Conv(x, u) one = Constant<value_float = 1.0>() s = Add(c, one) y = Relu(s) }", {}, None),
    "sums without a convolution": ("{ a = Relu(x) c = Conv(a, u) b = Relu(c) s = Add(a, b) y = Relu(s) }", {}, None),
    "what is switched off": (f"{{ {BLOCK} s = Add(c, h) y = Relu(s) }}", {"residuals": False}, None),
}


def graph_of(body, parse, seed=0):
    graph = parse(HEAD + body)
    rng = np.random.default_rng(seed)
    for tensor in list(graph.inputs[1:]):
        tensor.to_constant(rng.normal(0, 0.3, tensor.shape).astype(np.float32))
        if not tensor.outputs:
            graph.tensors().pop(tensor.name, None)
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    for node in [node for node in graph.nodes if node.op == "Constant"]:
        node.outputs[0].to_constant(np.asarray(node.attrs["value_float"], np.float32))
        node.outputs[0].inputs.clear()
        graph.nodes.remove(node)
    return graph


def samples(count=4):
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((2, 4, 6, 6)).astype(np.float32)} for _ in range(count)]


def run(graph, ledger=None, **parameters):
    return QuantizeInt8(**parameters).run(graph, Context(ledger or Ledger(), SampledActivations(samples())))


def adds(graph):
    return {node.name: node for node in graph.nodes if node.op in ("Add", "Sum")}


@pytest.mark.parametrize("case", FIRES)
def test_a_residual_is_read_from_the_pair_that_is_there(case, parse):
    body, expected = FIRES[case]
    graph = graph_of(body, parse)
    plain = copy_graph(graph)

    result = run(graph)
    run(plain, residuals=False)

    found = {}
    for name, add in adds(graph).items():
        positions = [i for i, tensor in enumerate(add.inputs) if tensor.inputs[0].op == "DequantizeLinear"]
        if positions:
            (found[name],) = positions
            (pair,) = (tensor for tensor in add.inputs if tensor.inputs[0].op == "DequantizeLinear")
            assert {"Conv"} < {user.op for user in pair.outputs} | {"Add"}, "a convolution reads the same"
    assert found == expected
    ops = [node.op for node in graph.nodes]
    assert ops == [node.op for node in plain.nodes], "no node more than without"
    assert [rewrite.node for rewrite in result.rewrites if rewrite.node in expected] == list(expected)
    assert not result.asked.keys() & expected.keys()

    if len(expected) == 1:  # else the second Add's inputs differ by more than its own rounding
        ((name, position),) = expected.items()
        quantize = adds(graph)[name].inputs[position].inputs[0].inputs[0].inputs[0]
        tensor, scale = quantize.inputs[0].name, float(load_values(quantize.inputs[1]))
        (feeds,) = samples(1)
        found = Session(graph, [name, tensor]).run(feeds, [name, tensor])
        without = Session(plain, [name]).run(feeds, [name])[name]
        rounded = np.clip(np.rint(found[tensor] / scale), -128, 127) * scale
        # Sums of float32 values of order 1, rounded a few times.
        np.testing.assert_allclose(found[name], without - found[tensor] + rounded, atol=1e-5)


@pytest.mark.parametrize("case", LEAVES_ALONE)
def test_it_says_why_an_add_is_left_alone(case, parse):
    body, parameters, reason = LEAVES_ALONE[case]
    graph = graph_of(body, parse)

    result = run(graph, **parameters)

    assert {tensor.inputs[0].op for tensor in adds(graph)["s"].inputs if tensor.inputs} <= {
        "Conv", "Relu", "Sigmoid", "MatMul",
    }  # fmt: skip
    assert {miss.node: miss.reason for miss in result.near_misses}.get("s") == reason


def test_transformers_have_none(parse):
    text = (
        "(float[B,3,4] x, float[4,4] w, float[4,4] v) => (float[B,3,4] y)"
        "{ t = Transpose<perm = [0, 2, 1]>(x) p = MatMul(x, t) s = Softmax(p) c = MatMul(s, x) o = MatMul(c, w)"
        "  r = Add(o, x) h = MatMul(r, v) y = Add(h, r) }"
    )
    graph = parse(text)
    for tensor in list(graph.inputs[1:]):
        tensor.to_constant(np.ones(tensor.shape, np.float32))
    graph.inputs = graph.inputs[:1]
    data = [{"x": np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)}]
    result = QuantizeInt8().run(graph, Context(Ledger(), SampledActivations(data)))
    assert len(result.rewrites) == 2
    assert result.near_misses == []
    assert all(tensor.inputs[0].op != "DequantizeLinear" for add in adds(graph).values() for tensor in add.inputs[1:]
               if tensor.inputs)  # fmt: skip


def test_any_one_can_be_refused(parse):
    body, expected = FIRES["two blocks"]
    for refused in expected:
        graph = graph_of(body, parse)
        result = run(graph, Ledger(refused=[("QuantizeInt8", refused)]))
        assert refused not in [rewrite.node for rewrite in result.rewrites]
        assert adds(graph)[refused].inputs[1].inputs[0].op == "Relu"
        (other,) = expected.keys() - {refused}
        assert adds(graph)[other].inputs[1].inputs[0].op == "DequantizeLinear"


def test_first_and_last_are_layers(parse):
    body, _ = FIRES["a basic block"]
    result = run(graph_of(body, parse), exclude=["last"])
    assert result.kept == {"c": "excluded by 'last'"}
    with pytest.raises(LlmcError, match="'no' matches no node that it could take"):
        run(graph_of(body, parse), exclude=["no"])
