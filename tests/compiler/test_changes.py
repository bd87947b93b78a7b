"""What `--print-changed` says of a pass, against what was done to the graph by hand."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from llmc.compiler import pipeline
from llmc.compiler.changes import LINES_SHOWN, ChangePrinter, Changes, changes
from llmc.passes.fuse.fuse_gelu import FuseGelu
from llmc.passes.graph import Constant, Graph, Node, Variable, copy_graph, to_structure
from llmc.passes.simplify.eliminate_dead import EliminateDead

TEXT = "(float[N,4] x) => (float[N,4] y) { a = Relu(x) b = Concat <axis = 1> (a) c = Abs(b) y = Neg(c) }"
GELU = (
    "(float[N,4] x) => (float[N,4] y) <float s = {1.41421}, float one = {1.0}, float h = {0.5}> {"
    "d = Div(x, s) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, h) }"
)


def difference(graph: Graph, edit: Any) -> Changes:
    """What is found when `edit` has changed the graph in place."""
    before = to_structure(copy_graph(graph))
    edit(graph)
    return changes(before, to_structure(graph))


def weighted(parse: Any, values: np.ndarray) -> Graph:
    graph: Graph = parse("(float[N,16] x, float[16,16] w) => (float[N,16] y) { y = MatMul(x, w) }")
    graph.nodes[0].inputs[1] = Constant("w", values)
    graph.inputs = graph.inputs[:1]
    return graph


def test_nothing_changed(parse: Any) -> None:
    found = difference(parse(TEXT), lambda _: None)
    assert not found
    assert found.counts == {"removed": 0, "added": 0, "rewired": 0}


def test_a_node_removed_and_its_reader_rewired(parse: Any) -> None:
    def edit(graph: Graph) -> None:
        graph.nodes[3].inputs[0] = graph.nodes[1].outputs[0]
        del graph.nodes[2]

    found = difference(parse(TEXT), edit)
    assert found.lines == ["- c = Abs(b)  c", "~ Neg 'y': input 0: c → b"]
    assert found.counts == {"removed": 1, "added": 0, "rewired": 1}


def test_a_node_added_stands_where_it_is_in_the_graph(parse: Any) -> None:
    def edit(graph: Graph) -> None:
        new = Variable("n", np.float32)
        graph.nodes.insert(2, Node("Tanh", "tanh", inputs=[graph.nodes[1].outputs[0]], outputs=[new], domain="my.ops"))
        graph.nodes[3].inputs[0] = new

    found = difference(parse(TEXT), edit)
    assert found.lines == ["+ n = my.ops::Tanh(b)  tanh", "~ Abs 'c': input 0: b → n"]


def test_another_operator_under_the_same_name_is_another_node(parse: Any) -> None:
    found = difference(parse(TEXT), lambda graph: setattr(graph.nodes[0], "op", "Sigmoid"))
    assert sorted(found.lines) == ["+ a = Sigmoid(x)  a", "- a = Relu(x)  a"]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (0, "~ Concat 'b': axis: 1 → 0"),
        ("left", "~ Concat 'b': axis: 1 → left"),
        (Constant("t", np.arange(6, dtype=np.float16)), "~ Concat 'b': axis: 1 → float16[6] 0.0, 1.0, 2.0, 3.0, …"),
    ],
)
def test_an_attribute(parse: Any, value: object, line: str) -> None:
    assert difference(parse(TEXT), lambda graph: graph.nodes[1].attrs.update(axis=value)).lines == [line]


def test_nodes_of_subgraphs_are_looked_at_too(parse: Any) -> None:
    graph = parse(
        "(bool p, float[N] x) => (float[N] y) { y = If (p) <then_branch = t () => (float[N] a) { a = Relu(x) }, "
        "else_branch = e () => (float[N] b) { b = Abs(x) }> }"
    )
    found = difference(graph, lambda g: setattr(g.nodes[0].attrs["else_branch"].nodes[0], "op", "Neg"))
    assert sorted(found.lines) == ["+ b = Neg(x)  b", "- b = Abs(x)  b"]


def test_weights_of_another_type_or_with_other_values(parse: Any) -> None:
    values = np.ones((16, 16), np.float32)

    def replace(new: np.ndarray) -> Any:
        return lambda graph: setattr(graph.nodes[0].inputs[1], "_values", new)

    assert not difference(weighted(parse, values), replace(values.copy()))
    found = difference(weighted(parse, values), replace(2 * values))
    assert found.lines == ["~ weight w float32[16, 16]: other values"]
    found = difference(weighted(parse, values), replace(values.astype(np.float16)))
    assert found.lines == ["~ weight w: float32[16, 16] → float16[16, 16]"]


def test_a_small_constant_counts_where_its_values_change(parse: Any) -> None:
    graph = parse("(float[N] x) => (float[N] y) <float s = {2.0}> { y = Mul(x, s) }")
    found = difference(graph, lambda g: setattr(g.nodes[0].inputs[1], "_values", np.float32(3)))
    assert found.lines == ["~ weight s float32[]: other values"]


def test_inputs_and_outputs(parse: Any) -> None:
    def edit(graph: Graph) -> None:
        graph.inputs[0].dtype = np.dtype(np.float16)
        graph.outputs = [graph.nodes[2].outputs[0]]

    lines = difference(parse(TEXT), edit).lines
    assert lines[0] == "~ input x: float32[N, 4] → float16[N, 4]"
    assert "- output y float32[N, 4]" in lines


def printed(graph: Graph, *, colour: bool = False) -> str:
    stream = io.StringIO()
    printer = ChangePrinter(Console(file=stream, force_terminal=colour, color_system="standard" if colour else None))
    printer(pipeline.loaded(graph))
    for step in pipeline.run(pipeline.loaded(graph), [FuseGelu(), EliminateDead()], lambda _: None):
        printer(step)
    return stream.getvalue()


def test_the_printer_is_quiet_about_passes_that_change_nothing(parse: Any) -> None:
    lines = printed(parse(GELU)).splitlines()
    assert lines[0] == "1 fuse-gelu: 5 removed, 1 added"
    assert [line.split()[0] for line in lines[1:]] == [*"-----", "+"]  # eliminate-dead and the load are not there


def test_colours_are_for_terminals(parse: Any) -> None:
    assert "\x1b[32m" in printed(parse(GELU), colour=True)
    assert "\x1b" not in printed(parse(GELU))


def test_no_name_of_a_model_can_steer_the_terminal(parse: Any) -> None:
    graph = parse(GELU)
    for node in graph.nodes:
        node.name += "\x1b[2J[red]\nx"
    shown = printed(graph)
    assert "\x1b" not in shown
    assert "[red]" in shown


def test_what_is_too_much_to_read_is_counted(parse: Any) -> None:
    chain = " ".join(f"t{i} = Abs(t{i - 1})" for i in range(1, 100))
    graph = parse(f"(float[N] x) => (float[N] y) {{ y = Relu(x) t0 = Abs(x) {chain} }}")
    lines = printed(graph).splitlines()
    assert lines[0] == "2 eliminate-dead: 100 removed"
    assert len(lines) == 1 + LINES_SHOWN + 1
    assert "and 40 more" in lines[-1]
