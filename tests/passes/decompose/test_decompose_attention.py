from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, Skip
from llmc.passes.decompose.decompose_attention import DecomposeAttention
from llmc.passes.graph import to_model

FLAT = "float[B,S,12] q, float[B,T,12] k, float[B,T,12] v"
HEADS = "float[B,3,S,4] q, float[B,3,T,4] k, float[B,3,T,4] v"
THREE = "<q_num_heads=3, kv_num_heads=3>"
SPLIT = ["Reshape", "Transpose"] * 4
CORE = ["Mul", "MatMul", "Softmax", "MatMul"]
FIRES = {
    "flat": (f"({FLAT}) => (float[B,S,12] y) {{ y = Attention {THREE} (q, k, v) }}", [*SPLIT, *CORE]),
    "in heads": (f"({HEADS}) => (float[B,3,S,4] y) {{ y = Attention (q, k, v) }}", ["Transpose", *CORE]),
    "scaled": (f"({HEADS}) => (float[B,3,S,4] y) {{ y = Attention <scale=0.7> (q, k, v) }}", ["Transpose", *CORE]),
    "a mask to add": (
        f"({FLAT}, float[S,T] m) => (float[B,S,12] y) {{ y = Attention {THREE} (q, k, v, m) }}",
        [*SPLIT, *CORE, "Add"],
    ),
    "a mask of booleans": (
        f"({FLAT}, bool[B,1,S,T] m) => (float[B,S,12] y) {{ y = Attention {THREE} (q, k, v, m) }}",
        [*SPLIT, *CORE, "Where"],
    ),
}


@pytest.mark.parametrize("case", FIRES)
def test_it_spells_out_what_attention_computes(case, parse, random_feeds):
    text, operators = FIRES[case]
    graph = parse(text, opset=23)
    feeds = random_feeds(graph, size=5)
    if "bool" in text:
        feeds["m"][..., 0] = True  # each query sees a key
    exact = Session(graph).run(feeds)["y"]
    result = DecomposeAttention().run(graph, Context())
    assert [rewrite.node for rewrite in result.rewrites] == ["y"]
    assert Counter(node.op for node in graph.nodes) == Counter(operators)
    onnx.checker.check_model(to_model(graph), full_check=True)
    # float32: sums of 4 and 5 terms near 1, in another order
    np.testing.assert_allclose(Session(graph).run(feeds)["y"], exact, atol=1e-5)


LEFT = {
    "causal": (f"({HEADS}) => (float[B,3,S,4] y) {{ y = Attention <is_causal=1> (q, k, v) }}", "its is_causal is 1"),
    "softcap": (f"({HEADS}) => (float[B,3,S,4] y) {{ y = Attention <softcap=2.0> (q, k, v) }}", "its softcap is 2.0"),
    "shared heads": (
        "(float[B,4,S,4] q, float[B,2,T,4] k, float[B,2,T,4] v) => (float[B,4,S,4] y) { y = Attention (q, k, v) }",
        "its heads share keys and values, or their number is not known",
    ),
    "a cache": (
        f"({HEADS}, float[S,U] m, float[B,3,P,4] pk, float[B,3,P,4] pv) => (float[B,3,S,4] y)"
        "{ y, a, b = Attention (q, k, v, m, pk, pv) }",
        "it has 'pk' beside its mask: a cache, or lengths",
    ),
    "scores wanted": (
        f"({HEADS}) => (float[B,3,S,4] y, float[B,3,S,T] s) {{ y, , , s = Attention (q, k, v) }}",
        "more than its first output is used",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_it_says_why_it_leaves_one_alone(case, parse):
    text, reason = LEFT[case]
    graph = parse(text, opset=23)
    result = DecomposeAttention().run(graph, Context())
    assert not result.rewrites
    assert [miss.reason for miss in result.near_misses] == [reason]
    assert [node.op for node in graph.nodes] == ["Attention"]


def test_it_takes_those_that_the_recipe_includes(parse):
    text = f"({HEADS}) => (float[B,3,S,4] z) {{ y = Attention (q, k, v) z = Attention (y, k, v) }}"
    graph = parse(text, opset=23)
    DecomposeAttention(include=["last"]).run(graph, Context())
    assert Counter(node.op for node in graph.nodes)["Attention"] == 1


def test_a_graph_without_attention_is_skipped(parse):
    with pytest.raises(Skip, match="the graph has no Attention"):
        DecomposeAttention().run(parse("(float[3] x) => (float[3] y) { y = Relu(x) }"), Context())


def test_a_run_ends_after_the_rewrite_that_it_is_told(parse):
    graph = parse(FIRES["flat"][0], opset=23)
    assert not DecomposeAttention().run(graph, Context(Ledger(0))).rewrites
    assert [node.op for node in graph.nodes] == ["Attention"]
