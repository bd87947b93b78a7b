"""After each pass, inference of what rewrites have left unknown finds what inference of the whole graph does."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import onnx
import pytest

from llmc.compiler.recipe import Recipe
from llmc.passes.base import Context, Skip
from llmc.passes.graph import Graph, copy_graph, from_model, infer_missing_shapes, infer_shapes, scopes


def types(graph: Graph) -> dict[str, tuple[str, Any]]:
    made = [tensor for scope in scopes(graph) for node in scope.nodes for tensor in node.outputs]
    return {tensor.name: (str(tensor.dtype), tensor.shape) for tensor in made}


@pytest.mark.parametrize("seed", range(30))
def test_missing_shapes_are_those_of_the_whole_graph(
    seed: int, random_model: Callable[[random.Random], onnx.ModelProto]
) -> None:
    graph, context = from_model(random_model(random.Random(seed))), Context()
    infer_shapes(graph)
    for step in Recipe.load("optimize").passes:
        try:
            if not step.run(graph, context).rewrites:
                continue
        except Skip:
            continue
        whole = copy_graph(graph)
        infer_shapes(whole)
        infer_missing_shapes(graph)
        assert types(graph) == types(whole), step.key()
