from __future__ import annotations

import math
import xml.etree.ElementTree
from typing import Any

import numpy as np
import pytest

from llmc.compiler.blame import plot
from llmc.compiler.blame.growth import differs, growth, landmarks
from llmc.compiler.blame.region import Difference
from llmc.compiler.blame.report import Blame, Guilty, TensorError
from llmc.compiler.session import Session
from llmc.passes.graph import Graph

CHAIN = "(float[N,4] x, float[N,4] z) => (float[N,4] y) { a = Relu(x) BODY d = Exp(c) e = Add(d, z) y = Tanh(e) }"
BEFORE = CHAIN.replace("BODY", "b = Sigmoid(a) c = Neg(b)")
FEEDS = {
    "x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32),
    "z": np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32),
}


def error(value: float, name: str = "t") -> TensorError:
    return TensorError(
        tensor=name, node="n", op="Relu", module="m", dtype="float32", relative_l2=value, max_abs=value, cosine=1.0,
        finite=math.isfinite(value), expected=(0.0, 1.0), found=(0.0, 1.0),
    )  # fmt: skip


def test_the_error_begins_where_the_graphs_differ_and_has_numpy_s_size(parse: Any) -> None:
    before, after = parse(BEFORE), parse(CHAIN.replace("BODY", "B = Softsign(a) c = Neg(B)"))
    errors = growth(before, after, FEEDS)
    assert [e.tensor for e in errors] == ["a", "c", "d", "e", "y"]  # what was fused away has no name on one side
    assert [differs(e) for e in errors] == [False, True, True, True, True]
    a = np.maximum(FEEDS["x"], 0)
    expected, found = -1 / (1 + np.exp(-a)), -a / (1 + a)
    assert errors[1].relative_l2 == pytest.approx(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert errors[1].expected == pytest.approx((expected.min(), expected.max()))
    assert (errors[1].node, errors[1].op) == (next(n.name for n in after.nodes if n.op == "Neg"), "Neg")


def test_a_tensor_that_becomes_infinite_shows_its_range(parse: Any) -> None:
    after = parse(CHAIN.replace("BODY", "b = Sigmoid(a) o = Sub(b, b) c = Div(b, o)"))
    found = {e.tensor: e for e in growth(parse(BEFORE), after, FEEDS)}
    assert not found["c"].finite
    expected = -1 / (1 + np.exp(-np.maximum(FEEDS["x"], 0)))
    assert found["c"].expected == pytest.approx((expected.min(), expected.max()))
    assert found["b"].finite


@pytest.mark.parametrize(
    ("body", "output", "inputs", "operators"),
    [
        ("B = Softsign(a) c = Neg(B)", "c", ["a"], (["Sigmoid", "Neg"], ["Softsign", "Neg"])),
        ("b = Softsign(a) c = Neg(b)", "b", ["a"], (["Sigmoid"], ["Softsign"])),
        ("b = Sigmoid(a) c = Elu(b)", "c", ["b"], (["Neg"], ["Elu"])),
        ("b = Sigmoid(a) c = Add(b, z)", "e", ["b", "z"], (["Neg", "Exp", "Add"], ["Add", "Exp", "Add"])),
        ("c = Mul(a, x)", "c", ["a", "x"], (["Sigmoid", "Neg"], ["Mul"])),
    ],
)
def test_the_part_that_differs_is_cut_out(
    body: str, output: str, inputs: list[str], operators: tuple[list[str], list[str]], parse: Any
) -> None:
    before, after = parse(BEFORE), parse(CHAIN.replace("BODY", body))
    difference = Difference(before, after)
    parts = difference.part(output)
    assert tuple([node.op for node in part.nodes] for part in parts) == operators
    for whole, part in zip((before, after), parts, strict=True):
        assert sorted(tensor.name for tensor in part.inputs) == sorted(inputs)
        values = Session(whole, [*inputs, output]).run(FEEDS)
        np.testing.assert_array_equal(Session(part).run({**FEEDS, **values})[output], values[output])


def test_weights_count_by_value_and_untouched_tensors_have_no_part(parse: Any) -> None:
    def weighted(number: float) -> Graph:
        return parse(f"(float[N,4] x) => (float[N,4] y) <float c = {{{number}}}> {{ a = Relu(x) y = Mul(a, c) }}")

    assert Difference(weighted(2), weighted(2)).touched == set()
    difference = Difference(weighted(2), weighted(3))
    assert difference.touched == {"y"}
    with pytest.raises(ValueError, match="nothing that differs leads to 'a'"):
        difference.part("a")


def test_landmarks_are_the_beginning_the_jumps_and_the_end() -> None:
    sizes = [0.0, 1e-6, 1e-6, 1e-6, 1e-3, 1e-3, 1e-3, math.inf, math.inf, 2e-3]
    errors = [error(size, str(index)) for index, size in enumerate(sizes)]
    assert [e.tensor for e in landmarks(errors, 4)] == ["1", "4", "7", "9"]
    assert [e.tensor for e in landmarks(errors[:3], 4)] == ["1", "2"]


def test_the_sparkline_shows_what_is_equal_small_large_and_not_finite() -> None:
    line = plot.sparkline([error(v) for v in (0.0, 1e-6, 1e-6, 1e-2, math.inf)], 80)
    assert line == "·▁▁█×"
    assert len(plot.sparkline([error(1e-3)] * 1000, 80)) == 80
    assert plot.sparkline([], 80) == ""


def test_the_plot_is_well_formed_whatever_the_names() -> None:
    guilty = Guilty(number=3, pass_index=1, key="k", rule="r", node="<&>", module="", detail="", share=1.0)
    errors = [error(v, f"<{i}&\"'") for i, v in enumerate((0.0, 1e-6, math.inf, 1e-2))]
    blame = Blame(
        status="broken", source="s", recipe="r", budget={"cosine": 1}, rewrites=3, points=[], monotone=True,
        guilty=guilty, appears=errors[1], growth=errors, total=errors,
    )  # fmt: skip
    root = xml.etree.ElementTree.fromstring(plot.svg(blame))
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert [c.get("class") for c in circles] == ["mark", "mark broken", "mark"]
    heights = [float(c.get("cy") or "nan") for c in circles]
    assert heights[1] < heights[2] < heights[0]  # down is small
