from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Ledger
from llmc.passes.graph import Constant, copy_graph, load_values, to_model
from llmc.passes.simplify.simplify_shapes import SimplifyShapes

B, S = 2, 3
HEAD = "(float[B,S,12] x, float[B,S] m) => ({outputs}) <int64 none = {{0}}, int64 one = {{1}}, int64[1] last = {{-1}}, "
HEAD += "int64[1] four = {{4}}, int64[1] batch_axis = {{0}}, int64[1] row_axis = {{1}}> {{{body}}}"
SIZES = "b = Shape<start=0, end=1>(x) s = Shape<start=1, end=2>(x) "
RANGES = SIZES + "bs = Squeeze(b) ss = Squeeze(s) ib = Range(none, bs, one) is = Range(none, ss, one) "
GRID = (
    "ab = Constant<value_ints = [1,2,3]>() as = Constant<value_ints = [0,1,2]>() "
    + RANGES
    + "jb = Unsqueeze(ib, ab) js = Unsqueeze(is, as) "
)
PAIRS = (
    "g = Max(jb, js) h = Shape(g) eb = Expand(jb, h) es = Expand(js, h) ub = Unsqueeze(eb, last) "
    "us = Unsqueeze(es, last) i = Concat<axis=-1>(ub, us) "
)

LEGACY = (
    RANGES + "rs = Constant<value_ints = [-1,1]>() rb = Constant<value_ints = [-1,1,1,1]>() "
    "one1 = Constant<value_ints = [1]>() "
    "ax = Constant<value_ints = [1,2]>() e = Unsqueeze(m, ax) t = Concat<axis=0>(b, one1, s, s) u = Expand(e, t) "
    "v = Sin(u) jb = Reshape(ib, rb) js = Reshape(is, rs) h = Shape(v) zero3 = Constant<value = int64[1,1,1] {0}>() "
    "eb = Expand(jb, h) ez = Expand(zero3, h) es = Expand(js, h) et = Expand(is, h) ub = Unsqueeze(eb, last) "
    "uz = Unsqueeze(ez, last) us = Unsqueeze(es, last) ut = Unsqueeze(et, last) "
)
"""v [B, 1, S, S], and the places of its elements as the legacy exporter writes them to assign to all."""


def model(body: str, outputs: str) -> str:
    return HEAD.format(body=body, outputs=outputs)


FIRES = {
    "heads": (
        model(SIZES + "t = Concat<axis=0>(b, s, last, four) y = Reshape(x, t)", "float[B,S,3,4] y"),
        {"Reshape": 1},
        [0, 0, 3, 4],
    ),
    "batch in front of others": (
        model(
            "s = Shape<start=1, end=2>(x) t = Concat<axis=0>(last, s, four) z = Relu(x) y = Reshape(z, t)",
            "float[N,S,4] y",
        ),
        {"Relu": 1, "Reshape": 1},
        [-1, 0, 4],
    ),
    "the shape that is there": (
        model(SIZES + "t = Concat<axis=0>(b, s, last) z = Reshape(x, t) y = Relu(z)", "float[B,S,12] y"),
        {"Relu": 1},
        None,
    ),
    "there and back": (
        model(
            SIZES + "p = Concat<axis=0>(last, four) z = Reshape(x, p) t = Concat<axis=0>(b, s, last) w = Reshape(z, t) "
            "y = Relu(w)",
            "float[B,S,12] y",
        ),
        {"Relu": 1},
        None,
    ),
    "Slice of everything": (
        model(SIZES[SIZES.index("s =") :] + "z = Slice(x, batch_axis, s, row_axis) y = Relu(z)", "float[B,S,12] y"),
        {"Relu": 1},
        None,
    ),
    "Slice of as many from the end as there are": (
        model(SIZES[SIZES.index("s =") :] + "n = Neg(s) z = Slice(x, n, s, row_axis) y = Relu(z)", "float[B,S,12] y"),
        {"Relu": 1},
        None,
    ),
    "Expand by numbers": (
        model(
            SIZES + "k = Constant<value_ints = [12]>() t = Concat<axis=0>(four, b, s, k) u = Unsqueeze(x, batch_axis) "
            "y = Expand(u, t)",
            "float[4,B,S,12] y",
        ),
        {"Unsqueeze": 1, "Expand": 1},
        [4, 1, 1, 1],
    ),
    "equal sizes of two tensors": (
        model(
            "a = Shape<start=0, end=1>(x) b = Shape<start=0, end=1>(m) s = Concat<axis=0>(a, four) "
            "t = Concat<axis=0>(b, four) y = ConstantOfShape(s) z = ConstantOfShape(t)",
            "float[B,4] y, float[B,4] z",
        ),
        {"Shape": 1, "Concat": 1, "ConstantOfShape": 2},
        None,
    ),
    "GatherND of everything": (
        model(GRID + PAIRS + "y = GatherND(m, i)", "float[B,1,1,S] y"),
        {"Reshape": 1},
        [0, 1, 1, -1],
    ),
    "ScatterND to everything": (
        model(
            LEGACY + "i = Concat<axis=-1>(ub, uz, us, ut) c = Cos(v) w = ScatterND(v, i, c) y = Relu(w)",
            "float[B,1,S,S] y",
        ),
        {"Unsqueeze": 1, "Shape": 2, "Concat": 1, "Expand": 1, "Sin": 1, "Cos": 1, "Relu": 1},
        None,
    ),
    "Gather of everything, by row and column": (
        model(GRID + "f = Flatten<axis=2>(m) w = Mul(jb, s) i = Add(js, w) y = Gather(f, i)", "float[B,1,1,S,1] y"),
        {"Reshape": 1},
        [0, 1, 1, -1, 1],
    ),
}


def run(graph: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    given = {"x": rng.standard_normal((B, S, 12)), "m": rng.standard_normal((B, S))}
    return Session(graph).run({name: value.astype(np.float32) for name, value in given.items()})


@pytest.mark.parametrize("name", FIRES)
def test_simplifies(name: str, parse: Any) -> None:
    text, counts, target = FIRES[name]
    graph = parse(text)
    simple = copy_graph(graph)
    SimplifyShapes().run(simple, Context())
    assert Counter(n.op for n in simple.nodes) == counts
    if target is not None:
        shape = simple.nodes[-1].inputs[1]
        assert isinstance(shape, Constant)
        assert load_values(shape).tolist() == target
    onnx.checker.check_model(to_model(simple), full_check=True)
    before, after = run(graph), run(simple)
    for output, value in before.items():
        np.testing.assert_array_equal(after[output], value)


LEAVES_ALONE = {
    "two unknown sizes": model(
        "i = Constant<value_ints = [1,0]>() h = Shape<end=2>(x) p = Gather(h, i) t = Concat<axis=0>(p, last) "
        "y = Reshape(x, t)",
        "float[S,B,12] y",
    ),
    "gather in another order": model(
        GRID + PAIRS.replace("(ub, us)", "(us, ub)") + "y = GatherND(m, i)", "float[B,1,1,S] y"
    ),
    "ScatterND that swaps rows and columns": model(
        LEGACY + "i = Concat<axis=-1>(ub, uz, ut, us) c = Cos(v) y = ScatterND(v, i, c)",
        "float[B,1,S,S] y",
    ),
    "ScatterND that adds": model(
        LEGACY + 'i = Concat<axis=-1>(ub, uz, us, ut) c = Cos(v) y = ScatterND<reduction="add">(v, i, c)',
        "float[B,1,S,S] y",
    ),
    "gather of a part": model(
        "two = Constant<value = int64 {2}>() i = Range(none, two, one) y = Gather<axis=1>(m, i)",
        "float[B,2] y",
    ),
    "Slice backwards": model(
        "e = Constant<value = int64[1] {-9223372036854775808}>() y = Slice(x, last, e, row_axis, last)",
        "float[B,S,12] y",
    ),
    "Slice of everything that the graph gives back": model(
        SIZES[SIZES.index("s =") :] + "y = Slice(x, batch_axis, s, row_axis)", "float[B,S,12] y"
    ),
    "Slice of as many as another axis has": model(
        "b = Shape<start=0, end=1>(x) y = Slice(x, batch_axis, b, row_axis)", "float[B,T,12] y"
    ),
    "Slice of which a name says that it is everything": model(
        "e = Constant<value_ints = [2]>() z = Slice(x, batch_axis, e, row_axis) y = Relu(z)", "float[B,S,12] y"
    ),
    "the shape that is there, of an output": model(
        "t = Constant<value_ints = [0,0,12]>() y = Reshape(x, t)", "float[B,S,12] y"
    ),
}


SHAPED = ("Reshape", "Expand", "Gather", "GatherND", "ScatterND", "Slice")


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    graph = parse(LEAVES_ALONE[name])
    before = [n.op for n in graph.nodes if n.op in SHAPED]
    SimplifyShapes().run(graph, Context())
    assert [n.op for n in graph.nodes if n.op in SHAPED] == before


def test_a_second_run_finds_nothing(parse: Any) -> None:
    graph = parse(FIRES["heads"][0])
    assert SimplifyShapes().run(graph, Context()).rewrites
    assert not SimplifyShapes().run(graph, Context()).rewrites


def test_every_prefix_of_the_rewrites_is_a_valid_model(parse: Any) -> None:
    text = FIRES["Gather of everything, by row and column"][0]
    graph = parse(text)
    expected = run(graph)["y"]
    for count in range(len(SimplifyShapes().run(parse(text), Context()).rewrites)):
        simple = copy_graph(graph)
        SimplifyShapes().run(simple, Context(ledger=Ledger(stop_after=count)))
        np.testing.assert_array_equal(run(simple)["y"], expected)
