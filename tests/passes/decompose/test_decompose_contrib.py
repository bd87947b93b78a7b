"""What becomes of a graph; the numbers of each operator are compared in the files beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.decompose.decompose_contrib import FAMILIES, REFUSALS, DecomposeContrib
from llmc.passes.decompose.decompose_quantized import FAMILIES as QUANTIZED_FAMILIES
from llmc.passes.graph import Graph, from_model, metadata, scopes, to_model

TWO = (
    "(float[N,4] x) => (float[N,4] y, float[N,4] z) <float[4] b = {1, 2, 3, 4}> "
    "{ z = com.microsoft.BiasGelu(x, b) a = Relu(z) y = com.microsoft.QuickGelu(a) }"
)


def graph_of(text: str, opset: int = 23) -> Graph:
    return from_model(
        onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1, "my.domain": 1]> g {text}'
        )
    )


def operators(graph: Graph) -> list[str]:
    return [node.op for scope in scopes(graph) for node in scope.nodes]


FIRES = {
    "BiasGelu": ("a = com.microsoft.BiasGelu(x, b) y = Identity(a)", ["Add", "Gelu", "Identity"]),
    "FastGelu": ("y = com.microsoft.FastGelu(x)", ["Gelu"]),
    "QuickGelu": ("y = com.microsoft.QuickGelu(x)", ["Mul", "Sigmoid", "Mul"]),
    "QuickGelu with alpha 1": ("y = com.microsoft.QuickGelu<alpha = 1.0>(x)", ["Sigmoid", "Mul"]),
    "SkipLayerNormalization": ("y = com.microsoft.SkipLayerNormalization(x, x, g, b)", ["Add", "LayerNormalization"]),
    "SkipLayerNormalization with a bias": (
        "y = com.microsoft.SkipLayerNormalization(x, x, g, b, b)",
        ["Add", "Add", "LayerNormalization"],
    ),
    "its sum too": (
        'n, "", "", t = com.microsoft.SkipLayerNormalization(x, x, g) y = Mul(n, t)',
        ["Add", "LayerNormalization", "Mul"],
    ),
    "SkipSimplifiedLayerNormalization": (
        "y = com.microsoft.SkipSimplifiedLayerNormalization(x, x, g)",
        ["Add", "RMSNormalization"],
    ),
    "SimplifiedLayerNormalization": ("y = SimplifiedLayerNormalization(x, g)", ["RMSNormalization"]),
    "FusedMatMul": (
        "a = com.microsoft.FusedMatMul<transB = 1, alpha = 0.5>(x, x) y = com.microsoft.FusedMatMul(a, x)",
        ["Transpose", "MatMul", "Mul", "MatMul"],
    ),
    "Attention": ("y = com.microsoft.Attention<num_heads = 2>(x, w, c)", ["MatMul", "Add", "Split", "Attention"]),
    "causal Attention": (
        "y = com.microsoft.Attention<num_heads = 2, unidirectional = 1>(x, w, c)",
        ["MatMul", "Add", "Split", "Attention"],
    ),
    "MultiHeadAttention": ("y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, x)", ["Attention"]),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, random_feeds: Any) -> None:
    body, expected = FIRES[name]
    graph = graph_of(
        f"(float[N,3,4] x, float[4] g, float[4] b, float[4,12] w, float[12] c) => (float[N,3,4] y) {{ {body} }}"
    )
    before = Session(graph).run(random_feeds(graph))["y"]
    result = DecomposeContrib().run(graph, Context())
    assert operators(graph) == expected
    assert result.near_misses == []
    after = Session(graph).run(random_feeds(graph))["y"]
    assert np.allclose(after, before, rtol=0, atol=2e-5 * max(1, np.abs(before).max()))


LEAVES_ALONE = {
    "an operator that no pass knows": ("y = com.microsoft.CDist(x, x)", "no pass spells it out"),
    "an operator that nothing standard does": ("y = com.microsoft.Inverse(x)", "ONNX has no matrix inverse"),
    "statistics that something reads": (
        "n, m = com.microsoft.SkipLayerNormalization(x, x, g) y = Add(n, m)",
        "'m' is used",
    ),
    "a width that is no multiple": ("y = com.microsoft.Attention<num_heads = 2>(x, u)", "is not a multiple of 3"),
    "no key, and not packed": ("y = com.microsoft.MultiHeadAttention<num_heads = 2>(x)", "its query is not packed"),
    "a domain of someone else": ("y = my.domain.Gelu(x)", ""),
}


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str) -> None:
    body, reason = LEAVES_ALONE[name]
    graph = graph_of(f"(float[N,3,4] x, float[4] g, float[4,10] u) => (float[N,3,4] y) {{ {body} }}")
    before = to_model(graph)
    result = DecomposeContrib().run(graph, Context())
    assert result.rewrites == []
    assert to_model(graph).graph.node == before.graph.node
    assert [reason in miss.reason for miss in result.near_misses] == [True] * bool(reason)


def test_keeps_names_of_outputs_and_merges_metadata() -> None:
    graph = graph_of(TWO)
    metadata(graph.nodes[0])["pkg.torch.onnx.name_scopes"] = "['', 'mlp', 'act']"
    result = DecomposeContrib().run(graph, Context())
    assert [t.name for t in graph.outputs] == ["y", "z"]
    assert [metadata(node).get("pkg.torch.onnx.name_scopes") for node in graph.nodes[:2]] == ["['', 'mlp', 'act']"] * 2
    assert [(r.rule, r.module) for r in result.rewrites] == [("BiasGelu", "mlp"), ("QuickGelu", "")]


@pytest.mark.parametrize("stop_after", range(4))
def test_stops_after_any_rewrite_with_the_same_results(stop_after: int, random_feeds: Any) -> None:
    graph = graph_of(TWO, opset=17)
    feeds = random_feeds(graph)
    expected = Session(graph).run(feeds)
    result = DecomposeContrib().run(graph, Context(Ledger(stop_after)))
    assert len(result.rewrites) == min(stop_after, 2)
    found = Session(graph).run(feeds)
    assert all(np.allclose(found[key], expected[key], rtol=0, atol=1e-5) for key in expected)


def test_raises_the_opset_only_where_something_needs_it() -> None:
    quick = graph_of("(float[N,4] x) => (float[N,4] y) { y = com.microsoft.QuickGelu(x) }", opset=14)
    DecomposeContrib().run(quick, Context())
    exact = graph_of("(float[N,4] x) => (float[N,4] y) { y = com.microsoft.Gelu(x) }", opset=14)
    DecomposeContrib().run(exact, Context())
    refused = graph_of("(float[N,4] x) => (float[N,4] y) { y = com.microsoft.Inverse(x) }", opset=14)
    DecomposeContrib().run(refused, Context())
    assert (quick.opset, exact.opset, refused.opset) == (14, 20, 14)


def test_says_why_the_opset_cannot_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.passes.decompose.families.raise_opset", lambda _, version: f"no way to {version}")
    graph = graph_of(
        "(float[N,4] x) => (float[N,4] y) { a = com.microsoft.QuickGelu(x) y = com.microsoft.Gelu(a) }", opset=13
    )
    result = DecomposeContrib().run(graph, Context())
    assert [r.rule for r in result.rewrites] == ["QuickGelu"]
    assert [(m.node, m.reason) for m in result.near_misses] == [(graph.nodes[-1].name, "no way to 20")]
    assert operators(graph)[-1] == "Gelu"


def test_in_subgraphs(random_feeds: Any) -> None:
    graph = graph_of(
        "(bool c, float[N,4] x) => (float[N,4] y) { y = If(c) <"
        "then_branch = t () => (float[N,4] a) { a = com.microsoft.Gelu(x) },"
        "else_branch = e () => (float[N,4] b) { b = Neg(x) }> }"
    )
    feeds = random_feeds(graph) | {"c": np.array(True)}
    expected = Session(graph).run(feeds)["y"]
    DecomposeContrib().run(graph, Context())
    assert operators(graph) == ["If", "Gelu", "Neg"]
    assert np.allclose(Session(graph).run(feeds)["y"], expected, rtol=0, atol=1e-6)


def test_shapes_are_found_along_the_way() -> None:
    """ONNX's inference ends at a node that it does not know: the second needs the rank that the first one makes."""
    graph = graph_of(
        "(float[N,2,4] x) => (float y) { a = com.microsoft.FusedMatMul<transB=1>(x, x) b = Relu(a) "
        "y = com.microsoft.FusedMatMul<transA=1>(b, x) }"
    )
    result = DecomposeContrib().run(graph, Context())
    assert operators(graph) == ["Transpose", "MatMul", "Relu", "Transpose", "MatMul"]
    assert result.near_misses == []


def test_a_graph_without_such_operators_is_not_touched(parse: Any) -> None:
    graph = parse("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", opset=13)
    before = to_model(graph)
    assert DecomposeContrib().run(graph, Context()).rewrites == []
    assert to_model(graph) == before


def test_time_is_linear_in_the_nodes() -> None:
    """6,000 nodes in a row: seconds where each is looked at once."""
    count = 3_000
    nodes = []
    for i in range(count):
        nodes.append(onnx.helper.make_node("BiasGelu", [f"x{i}", "b"], [f"g{i}"], domain="com.microsoft"))
        nodes.append(onnx.helper.make_node("Relu", [f"g{i}"], [f"x{i + 1}"]))
    infos = [onnx.helper.make_tensor_value_info(name, 1, ["N", 4]) for name in ("x0", f"x{count}")]
    bias = onnx.numpy_helper.from_array(np.ones(4, np.float32), "b")
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_graph(nodes, "g", infos[:1], infos[1:], [bias])
    graph = from_model(onnx.helper.make_model(model, opset_imports=imports, ir_version=10))
    assert len(DecomposeContrib().run(graph, Context()).rewrites) == count
    assert operators(graph)[:3] == ["Add", "Gelu", "Relu"]


def test_every_decomposition_is_tested() -> None:
    folder = Path(__file__).parent
    tests = "".join(path.read_text() for path in folder.glob("test_*.py"))
    known = {operator for family in (*FAMILIES, *QUANTIZED_FAMILIES) for _, operator in family.of}
    untested = {
        op for op in known if not re.search(rf'"{op}"', tests) and f'"{op.removeprefix("QLinear")}"' not in tests
    }
    assert untested == set()
    assert not known & set(REFUSALS)


def test_without_padding_new_keys_stand_behind_the_past() -> None:
    """That this gives the same is seen on whole decoders, in tests/test_genai_decoders.py."""
    body = """(float[B,S,32] x, float[B,1,P,16] k, float[B,1,P,16] v, int32[B] ends, int32[1] total) =>
        (float[B,S,32] y, float[B,1,T,16] pk, float[B,1,T,16] pv) {
        y, pk, pv = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1>(x, n, m, k, v, ends, total) }"""
    body = body.replace("(x, n, m,", "(x, h, h,").replace("float[B,S,32] x,", "float[B,S,32] x, float[B,S,16] h,")
    padded, whole = graph_of(body), graph_of(body)
    first, second = DecomposeContrib().run(padded, Context()), DecomposeContrib(padded=False).run(whole, Context())
    assert [["Pad" in operators(g), "TensorScatter" in operators(g)] for g in (padded, whole)] == [
        [True] * 2,
        [False] * 2,
    ]
    assert ["Pad makes room" in miss.reason for miss in first.near_misses] == [True]
    assert second.near_misses == []
