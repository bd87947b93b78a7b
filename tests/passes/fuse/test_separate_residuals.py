from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.fuse.separate_residuals import SeparateResiduals
from llmc.passes.graph import copy_graph, to_model

NORM = "n = LayerNormalization <axis=-1> (a, s, b)"
HEAD = "(float[N,4,8] x, float[N,4,8] r, float[8] s, float[8] b) => (float[N,4,8] y{more}) {{"
FIRES = {
    "residual": (HEAD + "a = Add(x, r)" + NORM + "y = Relu(n) }}", ["Sum", "LayerNormalization", "Relu"]),
    "twice": (
        HEAD + "a = Add(x, r)" + NORM + "c = Add(n, x) y = LayerNormalization <axis=-1> (c, s, b) }}",
        ["Sum", "LayerNormalization", "Sum", "LayerNormalization"],
    ),
    "broadcast": (HEAD + "a = Add(x, b)" + NORM + "y = Add(n, r) }}", ["Sum", "LayerNormalization", "Add"]),
}
LEFT = {
    "a second user": (
        HEAD + "a = Add(x, r)" + NORM + "y = Add(n, a) }}",
        "",
        "'a' has other users: ONNX Runtime does not fuse it",
    ),
    "an output": (
        HEAD + "a = Add(x, r)" + NORM + "y = Relu(n) }}",
        ", float[N,4,8] a",
        "'a' is an output of the graph: ONNX Runtime does not fuse it",
    ),
}
QUIET = {
    "no normalisation": HEAD + "a = Add(x, r) y = Relu(a) }}",
    "it makes the weight of one": HEAD + "a = Add(s, b) y = LayerNormalization <axis=-1> (x, a, b) }}",
}


@pytest.mark.parametrize("case", FIRES)
def test_fires(case, fires):
    text, made = FIRES[case]
    assert len(fires(SeparateResiduals(), text.format(more=""), made).rewrites) == made.count("Sum")


@pytest.mark.parametrize("case", LEFT)
def test_leaves_alone(case, leaves_alone):
    text, more, reason = LEFT[case]
    leaves_alone(SeparateResiduals(), text.format(more=more), reason)


def test_float16_is_left_alone(leaves_alone):
    text = (HEAD + "a = Add(x, r)" + NORM + "y = Relu(n) }}").format(more="").replace("float", "float16")
    leaves_alone(SeparateResiduals(), text, "'a' is float16, not float32")


@pytest.mark.parametrize("case", QUIET)
def test_other_additions_are_not_mentioned(case, parse):
    graph = parse(QUIET[case].format(more=""))
    result = SeparateResiduals().run(graph, Context())
    assert not result.rewrites
    assert not result.near_misses


def test_it_is_exact(parse, random_feeds):
    graph = parse(FIRES["twice"][0].format(more=""))
    feeds, separated = random_feeds(graph), copy_graph(graph)
    SeparateResiduals().run(separated, Context())
    np.testing.assert_array_equal(Session(separated).run(feeds)["y"], Session(graph).run(feeds)["y"])


def test_a_run_ends_after_the_rewrite_that_it_is_told(parse):
    graph = parse(FIRES["twice"][0].format(more=""))
    SeparateResiduals().run(graph, Context(Ledger(1)))
    assert [node.op for node in graph.nodes] == ["Sum", "LayerNormalization", "Add", "LayerNormalization"]


def test_it_fires_inside_a_subgraph(parse):
    graph = parse(
        "(bool c, float[2,8] x, float[8] s, float[8] b) => (float[2,8] y) {"
        "y = If (c) <then_branch = t () => (float[2,8] ty) { a = Add(x, x) ty = LayerNormalization (a, s, b) },"
        " else_branch = f () => (float[2,8] ey) { ey = Identity(x) }> }"
    )
    assert len(SeparateResiduals().run(graph, Context()).rewrites) == 1
    assert graph.nodes[0].attrs["then_branch"].nodes[0].op == "Sum"


def test_onnx_runtime_fuses_the_addition_before_and_not_after(parse, tmp_path):
    """What the pass is for; should ONNX Runtime change its mind, this says so."""
    graph = parse(FIRES["residual"][0].format(more=""), opset=17)

    def operators() -> set[str]:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(to_model(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
        return {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}

    assert "SkipLayerNormalization" in operators()
    SeparateResiduals().run(graph, Context())
    assert operators() == {"Sum", "LayerNormalization", "Relu"}
