"""Caches of drawn samples hold what the model would have written into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.data import generate
from llmc.compiler.data.own_cache import with_own_cache
from llmc.compiler.planning import plan
from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.passes.graph import Constant, Graph, infer_shapes, save_model

SIZES = [{"B": 2, "S": 3, "P": 4}, {"B": 1, "S": 5, "P": 2}, {"B": 2, "S": 2, "P": 0}]
CACHES = {"pk": "past_key_values.0.key", "pv": "past_key_values.0.value", "k": "present.0.key", "v": "present.0.value"}
RECIPE = """
model: {dimensions: {B: [1, 2, 2], S: [1, 3, 4], P: [1, 4, 4]}}
passes: [PASS]
target: {kind: onnx}
verify: {samples: 4}
"""


@pytest.fixture
def graph(parse: Any) -> Graph:
    """One causal attention over the rows of a table, each of which is query, key and value."""
    graph: Graph = parse(
        "(int64[B,S] input_ids, int64[B,S] position_ids, float[B,2,P,4] pk, float[B,2,P,4] pv, float[16,8] table)"
        " => (float[B,2,S,4] logits, float[B,2,N,4] k, float[B,2,N,4] v) {"
        "x = Gather(table, input_ids) heads = Constant<value_ints = [0, 0, 2, 4]>() xr = Reshape(x, heads)"
        "n = Transpose<perm = [0, 2, 1, 3]>(xr) nv = Neg(n)"
        "p = Cast<to = 1>(position_ids) ends = Constant<value_ints = [1, 3]>() pu = Unsqueeze(p, ends) q = Add(n, pu)"
        "logits, k, v = Attention<is_causal = 1>(q, q, nv, , pk, pv) }",
        opset=24,
    )
    graph.inputs.pop().to_constant(np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32))
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    for tensor in (*graph.inputs, *graph.outputs):
        tensor.name = CACHES.get(tensor.name, tensor.name)
    infer_shapes(graph)
    return graph


def test_a_sample_goes_on_where_its_cache_ends(graph: Graph) -> None:
    """What the graph says to the tokens of a sample is what it says to them behind the earlier ones, in one run."""
    session = Session(graph)
    drawn = generate(graph, SIZES, count=3)
    own = with_own_cache(drawn, graph)
    assert (own.name, own.random, len(own)) == (drawn.name, True, 3)
    assert own.digest != drawn.digest
    for given, sample in zip(drawn, own, strict=True):
        ids, length = sample["input_ids"], sample[CACHES["pk"]].shape[2]
        np.testing.assert_array_equal(ids, given["input_ids"])
        assert {name: (v.shape, v.dtype) for name, v in sample.items()} == {
            name: (v.shape, v.dtype) for name, v in given.items()
        }
        earlier = np.resize(ids, (len(ids), length))
        places = np.concatenate([np.arange(length)[None].repeat(len(ids), 0), sample["position_ids"]], axis=1)
        nothing = {name: sample[name][:, :, :0] for name in (CACHES["pk"], CACHES["pv"])}
        whole = session.run({"input_ids": np.concatenate([earlier, ids], axis=1), "position_ids": places, **nothing})[
            "logits"
        ]
        # float32: sums of 4 products, and of up to 7 weighted values
        np.testing.assert_allclose(session.run(sample)["logits"], whole[:, :, length:], rtol=0, atol=1e-5)


def test_a_graph_without_a_growing_cache_takes_what_is_drawn(parse: Any) -> None:
    other = parse("(int64[B,S] input_ids) => (float[B,S] y) { y = Cast<to = 1>(input_ids) }")
    drawn = generate(other, [{"B": 1, "S": 2}], count=1)
    assert with_own_cache(drawn, other) is drawn


@pytest.mark.parametrize(("step", "own"), [("quantize-kv-cache", True), ("fold-constants", False)])
def test_they_verify_passes_that_have_calibrated_on_them(graph: Graph, tmp_path: Path, step: str, own: bool) -> None:
    save_model(graph, tmp_path / "model.onnx")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("PASS", step), encoding="utf-8")
    made = plan(str(tmp_path / "model.onnx"), Recipe.load(tmp_path / "r.yaml"))
    cached = [tuple(row) for sample in made.verification for row in sample[CACHES["pv"]].reshape(-1, 4)]
    table = next(node for node in graph.nodes if node.op == "Gather").inputs[0].values.reshape(-1, 4)
    assert len(cached) > 0
    assert (set(cached) <= {tuple(row) for row in -table}) == own
