"""Parts of random graphs, with subgraphs, float16 and unknown shapes among them, compute what the whole computes."""

from __future__ import annotations

import random
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import onnx
from hypothesis import HealthCheck, Phase, assume, given, settings

from llmc.compiler.session import Session
from llmc.passes.base import LlmcError
from llmc.passes.graph import Graph, extract, from_model, infer_shapes, to_model

SIZE = 3
"""Of symbolic dimensions."""


@settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    max_examples=50,
    phases=[Phase.generate],
)
@given(st.randoms(use_true_random=False))
def test_a_part_computes_what_the_whole_computes(
    random_model: Callable[[random.Random], onnx.ModelProto],
    random_feeds: Callable[[Graph, int, int], dict[str, np.ndarray]],
    rng: random.Random,
) -> None:
    graph = from_model(random_model(rng))
    infer_shapes(graph)
    made = [tensor.name for node in graph.nodes for tensor in node.outputs if tensor.name]
    outputs = rng.sample(made, min(len(made), 3))
    cut = rng.sample(made, min(len(made), rng.randint(0, 4)))
    feeds = random_feeds(graph, rng.randrange(1 << 16), SIZE)
    try:
        whole = Session(graph, [*cut, *outputs]).run(feeds)
    except LlmcError:
        assume(False)  # ONNX Runtime itself cannot run some
    part = extract(graph, [*feeds, *cut], outputs)
    if all(tensor.shape is not None for tensor in (*part.inputs, *part.outputs)):  # the checker wants a rank
        onnx.checker.check_model(to_model(part), full_check=True)
    assert len(part.nodes) <= len(graph.nodes)
    found = Session(part).run({**whole, **feeds})
    assert list(found) == outputs
    for name in outputs:
        np.testing.assert_array_equal(found[name], whole[name])
