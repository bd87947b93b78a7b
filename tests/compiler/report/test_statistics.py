"""What the report says of a graph, and the precision that it finds layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmc.compiler.report import DtypeWeights
from llmc.compiler.report.statistics import count_operators, graph_report, layer_precision, weights_by_dtype
from llmc.passes.graph import Constant, Graph, Node, Variable, Weights, load_model, save_model

Parse = Callable[..., Graph]

BRANCHES = """(bool c, float[4,4] x) => (float[4,4] y) {
    h = Relu(x)
    y = If(c) <then_branch = t () => (float[4,4] p) { p = MatMul(h, x) },
               else_branch = e () => (float[4,4] q) { r = Relu(x)  q = com.example.Warp(r) }>
}"""


def test_operators_are_counted_in_subgraphs_and_named_with_their_domain() -> None:
    import onnx.parser

    from llmc.passes.graph import from_model

    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20, "com.example": 1]> g {BRANCHES}')
    counts = count_operators(from_model(model))
    assert list(counts.items()) == [("Relu", 2), ("If", 1), ("MatMul", 1), ("com.example::Warp", 1)]


def test_weights_by_dtype(parse: Parse) -> None:
    graph = parse("(float[4,6] x) => (float[4,6] y) { s = Constant<value_float=2.0>()  y = Mul(x, s) }")
    graph.nodes[0].inputs[1] = Constant("half", np.ones((4, 6), np.float16))
    other = Constant("index", np.arange(3, dtype=np.int64))
    graph.nodes.append(Node("Neg", inputs=[other], outputs=[Variable("n", np.int64, [3])]))
    graph.nodes.append(Node("Abs", inputs=[other], outputs=[Variable("a", np.int64, [3])]))
    assert weights_by_dtype(graph) == {
        "float16": DtypeWeights(parameters=24, bytes=48),
        "int64": DtypeWeights(parameters=3, bytes=24),
    }


def test_weights_are_not_loaded(parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = parse("(float[batch,512] x, float[512,512] w) => (float[batch,512] y) { y = MatMul(x, w) }")
    graph.nodes[0].inputs[1] = Constant("w", np.ones((512, 512), np.float32))
    graph.inputs = graph.inputs[:1]
    save_model(graph, tmp_path / "m.onnx", inline_below=1024)
    loaded = load_model(tmp_path / "m.onnx")

    def refuse(_self: Weights) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Weights, "load", refuse)
    report = graph_report(loaded, {"batch": 4})
    assert report.weights == {"float32": DtypeWeights(parameters=512 * 512, bytes=4 * 512 * 512)}
    assert report.flops == 2 * 4 * 512 * 512
    assert layer_precision(loaded, {}, {})[0].found == "float32"


def test_inputs_outputs_and_sizes(parse: Parse) -> None:
    graph = parse("(float16[batch,5] x, float16[5,6] w) => (float16[batch,6] y) { y = MatMul(x, w) }", opset=19)
    graph.outputs[0].shape = None
    report = graph_report(graph, {"batch": 2, "unused": 7})
    assert [(t.name, t.dtype, t.shape) for t in report.inputs] == [
        ("x", "float16", ["batch", 5]),
        ("w", "float16", [5, 6]),
    ]
    assert report.outputs[0].shape is None
    assert (report.opset, report.sizes, report.flops_uncounted) == (19, {"batch": 2}, 0)


PRECISION = {
    "as its input": (
        "(float16[4,8] x, float16[8,8] w) => (float16[4,8] y) { y = MatMul(x, w) }",
        "float16",
    ),
    "both operands dequantized": (
        """(float[4,8] x, int8[8,8] w, float s, int8 z) => (float[4,8] y) {
            q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)
            b = DequantizeLinear(w, s, z)  y = MatMul(a, b)
        }""",
        "int8",
    ),
    "the weight's dequantized form transposed": (
        """(float[4,8] x, int8[8,8] w, float s, int8 z) => (float[4,8] y) {
            q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)
            d = DequantizeLinear(w, s, z)  b = Transpose(d)  y = Gemm(a, b)
        }""",
        "int8",
    ),
    "only a constant dequantized": (
        """(float16[4,8] x, float16 s) => (float16[4,8] y) <int8[8,8] w> {
            b = DequantizeLinear(w, s)  y = MatMul(x, b)
        }""",
        "int8 weights",
    ),
    "only a constant dequantized, from 4 bits": (
        """(float16[4,8] x, float16[1,8] s) => (float16[4,8] y) <int4[8,8] w> {
            b = DequantizeLinear<axis=0, block_size=8>(w, s)  y = MatMul(x, b)
        }""",
        "int4 weights",
    ),
    "a constant quantized in the graph": (
        """(float[4,8] x, float s, int8 z) => (float[4,8] y) <float[8,8] w> {
            q = QuantizeLinear(w, s, z)  b = DequantizeLinear(q, s, z)  y = MatMul(x, b)
        }""",
        "int8 weights",
    ),
    "only the activation dequantized": (
        """(float[4,8] x, float[8,8] w, float s, int8 z) => (float[4,8] y) {
            q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)  y = MatMul(a, w)
        }""",
        "float32",
    ),
    "float8": (
        """(float[4,8] x, float8e4m3fn[8,8] w, float s, float8e4m3fn z) => (float[4,8] y) {
            q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)
            b = DequantizeLinear(w, s, z)  y = MatMul(a, b)
        }""",
        "float8_e4m3fn",
    ),
    "int8 activations on int4 weights": (
        """(float[4,8] x, int4[8,8] w, float s, int8 z, int4 z4) => (float[4,8] y) {
            q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)
            b = DequantizeLinear(w, s, z4)  y = MatMul(a, b)
        }""",
        "int8 × int4",
    ),
    "a cast after dequantizing": (
        """(float[4,8] x, int8[8,8] w, float s, int8 z) => (float16[4,8] y) {
            q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  a = Cast<to=10>(d)
            e = DequantizeLinear(w, s, z)  b = Cast<to=10>(e)  y = MatMul(a, b)
        }""",
        "float16",
    ),
    "integer operator": ("(int8[4,8] x, int8[8,8] w) => (int32[4,8] y) { y = MatMulInteger(x, w) }", "int8"),
    "a norm between casts": (
        """(float16[4,8] x, float[8] g) => (float16[4,8] y) {
            a = Cast<to=1>(x)  n = LayerNormalization(a, g)  y = Cast<to=10>(n)
        }""",
        "float32",
    ),
}


@pytest.mark.parametrize("name", PRECISION)
def test_the_precision_found(name: str, parse: Parse) -> None:
    text, expected = PRECISION[name]
    (layer,) = layer_precision(_with_values(text, parse), {}, {})
    assert layer.found == expected
    assert layer.asked == expected


def _with_values(text: str, parse: Parse) -> Graph:
    """The parser knows initializers by their type only: `<int8[8,8] w>` gets zeros."""
    declared = text.partition("=> ")[2].partition("{")[0].partition("<")[2].strip(" >")
    if not declared:
        return parse(text, opset=21)
    graph = parse(text.replace(f"<{declared}>", "").replace("(", f"({declared}, ", 1), opset=21)
    weight = graph.inputs.pop(0)
    for node in weight.outputs[:]:
        node.inputs[node.inputs.index(weight)] = Constant("weight", np.zeros(weight.shape, weight.dtype))
    return graph


def test_attention_is_int8_when_all_three_inputs_are(parse: Parse) -> None:
    text = """(int8[1,2,4,8] q, int8[1,2,4,8] k, int8[1,2,4,8] v, float s) => (float[1,2,4,8] y) {{
        a = DequantizeLinear(q, s)  b = DequantizeLinear(k, s)  c = DequantizeLinear(v, s)
        f = Relu(c)
        y = Attention(a, b, {value})
    }}"""
    found = [layer_precision(parse(text.format(value=v), opset=23), {}, {})[0].found for v in ("c", "f")]
    assert found == ["int8", "float32"]


def test_asked_and_kept_are_reported(parse: Parse) -> None:
    graph = parse(
        "(float[4,8] x, float[8,8] w, float[8] g) => (float[4,8] y)"
        "{ h = MatMul(x, w)  n = LayerNormalization(h, g)  s = Softmax(n)  y = Relu(s) }"
    )
    for node, name in zip(graph.nodes, ("product", "norm", "softmax", "relu"), strict=True):
        node.name = name
    layers = layer_precision(
        graph, {"product": "float16", "norm": "float16", "relu": "float16"}, {"norm": "its variance overflows"}
    )
    assert [(layer.node, layer.asked, layer.found, layer.reason) for layer in layers] == [
        ("product", "float16", "float32", ""),
        ("norm", "float16", "float32", "its variance overflows"),
        ("softmax", "float32", "float32", ""),
    ]


def test_layers_in_branches_are_reported(parse: Parse) -> None:
    graph = parse(
        """(bool c, float[4,4] x) => (float[4,4] y) {
            y = If(c) <then_branch = t () => (float[4,4] p) { p = MatMul(x, x) },
                       else_branch = e () => (float[4,4] q) { q = Relu(x) }>
        }"""
    )
    assert [(layer.op, layer.found) for layer in layer_precision(graph, {}, {})] == [("MatMul", "float32")]
