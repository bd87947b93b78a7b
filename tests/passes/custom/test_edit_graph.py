"""A user's function over an onnx-graphsurgeon graph, as a step of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger, LlmcError
from llmc.passes.custom.edit_graph import EditGraph
from llmc.passes.graph import Graph, Weights, copy_graph, load_values, metadata, module_of

MODEL = """(float[N,64] x) => (float[N,64] y) <float[64,64] w> {
    [first] a = MatMul(x, w)
    [second] b = Relu(a)
    y = MatMul(b, w)
}"""


@pytest.fixture
def graph(parse: Any) -> Graph:
    """Its weight is large enough to stay out of the proto; its nodes know their modules."""
    made: Graph = parse(MODEL.replace("<float[64,64] w>", "<float[64,64] w = {" + "0.5, " * 4095 + "1.0}>"))
    metadata(made.nodes[0])["pkg.torch.onnx.name_scopes"] = "['', 'encoder', 'encoder.dense']"
    return made


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], EditGraph]:
    """A pass that runs a function with this body, in a module of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def edit(body: str) -> EditGraph:
        name = f"edits_{len(made)}_{tmp_path.name}".replace("-", "_")
        made.append(name)
        (tmp_path / f"{name}.py").write_text(
            f"import numpy as np\nimport onnx_graphsurgeon as gs\ndef f(graph):\n    {body}\n"
        )
        return EditGraph(function=f"{name}:f")

    return edit


def test_the_function_changes_the_graph(graph: Graph, edit: Callable[[str], EditGraph]) -> None:
    before = copy_graph(graph)
    step = edit("for node in graph.nodes:\n        node.op = 'Tanh' if node.op == 'Relu' else node.op")
    result = step.run(graph, Context())
    assert [rewrite.rule for rewrite in result.rewrites] == [step.function]
    assert [node.op for node in graph.nodes] == ["MatMul", "Tanh", "MatMul"]
    assert module_of(graph.nodes[0]) == module_of(before.nodes[0]) != ""
    x = np.linspace(-1e-3, 1e-3, 128, dtype=np.float32).reshape(2, 64)
    w = np.full((64, 64), 0.5, np.float32)
    w[-1, -1] = 1.0
    # sums of 64 products in float32, twice
    np.testing.assert_allclose(Session(graph).run({"x": x})["y"], np.tanh(x @ w) @ w, rtol=1e-5, atol=1e-6)


def test_weights_are_read_only_where_the_function_asks(
    graph: Graph, edit: Callable[[str], EditGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = load_values(graph.nodes[0].inputs[1])
    loads: list[Weights] = []
    load = Weights.load
    monkeypatch.setattr(Weights, "load", lambda held: loads.append(held) or load(held))
    edit("graph.nodes[1].name = 'renamed'").run(graph, Context())
    assert graph.nodes[1].name == "renamed"
    assert not loads
    edit("graph.nodes[0].inputs[1].values = graph.nodes[0].inputs[1].values * 2").run(graph, Context())
    assert loads
    np.testing.assert_array_equal(load_values(graph.nodes[0].inputs[1]), values * 2)


def test_nothing_runs_after_the_last_rewrite(graph: Graph, edit: Callable[[str], EditGraph]) -> None:
    assert not edit("raise SystemExit").run(graph, Context(Ledger(0))).rewrites


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "returns int, not an onnx-graphsurgeon graph"),
        ("graph.outputs = []", "leaves a graph without outputs"),
    ],
)
def test_functions_that_leave_no_graph(graph: Graph, edit: Callable[[str], EditGraph], body: str, message: str) -> None:
    with pytest.raises(LlmcError, match=message):
        edit(body).run(graph, Context())


@pytest.mark.parametrize(
    ("function", "message"),
    [("no_such_module:f", "add its folder to PYTHONPATH"), ("json:no_such_function", "has no function")],
)
def test_functions_that_are_not_there(graph: Graph, function: str, message: str) -> None:
    with pytest.raises(LlmcError, match=message):
        EditGraph(function=function).run(graph, Context())
