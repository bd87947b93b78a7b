from __future__ import annotations

from typing import Any

import pytest

from llmc.passes.graph import infer_shapes
from llmc.passes.shapes.dimension import Dimension
from llmc.passes.shapes.dimensions import Dimensions

SHAPES = {
    "heads by -1": (
        "b = Shape<start=0, end=1>(x) s = Shape<start=1, end=2>(x) r = Constant<value_ints = [-1]>() "
        "d = Constant<value_ints = [4]>() t = Concat<axis=0>(b, s, r, d) y = Reshape(x, t)",
        "[B, S, 3, 4]",
    ),
    "batch by -1": ("t = Constant<value_ints = [-1, 12]>() y = Reshape(x, t)", "[B*S, 12]"),
    "zero copies": ("t = Constant<value_ints = [0, 0, 3, 4]>() y = Reshape(x, t)", "[B, S, 3, 4]"),
    "quotient of a product": (
        "n = Shape<start=0, end=1>(x) m = Shape<start=1, end=2>(x) p = Mul(n, m) q = Div(p, n) "
        "z = Constant<value_ints = [1]>() t = Concat<axis=0>(q, z) y = ConstantOfShape(t)",
        "[S, 1]",
    ),
    "length of a Range": (
        "i = Constant<value_int = 1>() h = Shape(x) n = Gather(h, i) o = Constant<value_int = 0>() y = Range(o, n, i)",
        "[S]",
    ),
    "length of a Range that begins elsewhere": (
        "i = Constant<value_int = 1>() h = Shape(x) n = Gather(h, i) g = Shape(w) m = Gather(g, i) e = Add(n, m) "
        "y = Range(m, e, i)",
        "[S]",
    ),
    "-1 in Expand of the legacy exporter": (
        "h = Shape(x) m = Constant<value_ints = [-1, -1, -1]>() e = Equal(h, m) o = Constant<value_ints = [1, 1, 1]>() "
        "t = Where(e, o, h) y = Expand(x, t)",
        "[B, S, 12]",
    ),
    "sum along an axis": ("y = Concat<axis=1>(x, x, w)", "[B, 2*S + T, 12]"),
    "positions cut off a table": (
        "k = Constant<value_ints = [2]>() a = Constant<value_ints = [1]>() o = Constant<value_ints = [0]>() "
        "tab = Constant<value = int64[1,5] {0,1,2,3,4}>() n = Shape<start=1, end=2>(x) c = Slice(tab, o, n, a) "
        "f = Cast<to=1>(c) u = Unsqueeze(f, k) y = Add(x, u)",
        "[B, S, 12]",
    ),
    "all but the last, where one is appended": (
        "o = Constant<value_ints = [0]>() m = Constant<value_ints = [-1]>() a = Constant<value_ints = [1]>() "
        "b = Shape<start=0, end=1>(x) k = Constant<value_ints = [1, 12]>() s = Concat<axis=0>(b, k) "
        "one = ConstantOfShape(s) j = Concat<axis=1>(x, one) y = Slice(j, o, m, a)",
        "[B, S, 12]",
    ),
    "all but the last of an axis that may be empty": (
        "o = Constant<value_ints = [0]>() m = Constant<value_ints = [-1]>() a = Constant<value_ints = [1]>() "
        "y = Slice(x, o, m, a)",
        "[B, ?, 12]",
    ),
    "as many from the end as there are": (
        "n = Shape<start=1, end=2>(x) m = Neg(n) a = Constant<value_ints = [1]>() "
        "e = Constant<value = int64[1] {9223372036854775807}>() y = Slice(x, m, e, a)",
        "[B, S, 12]",
    ),
    "as many from the end as another has": (
        "n = Shape<start=1, end=2>(w) m = Neg(n) a = Constant<value_ints = [1]>() "
        "e = Constant<value = int64[1] {9223372036854775807}>() y = Slice(x, m, e, a)",
        "[B, ?, 12]",
    ),
    "sizes that may broadcast": ("y = Add(x, v)", "[B, ?, 12]"),
    "one broadcasts": ("k = Constant<value_ints = [1]>() s = ReduceMean<keepdims=1>(x, k) y = Sub(x, s)", "[B, S, 12]"),
    "repeated as often as the batch": (
        "b = Shape<start=0, end=1>(x) k = Constant<value_ints = [2, 1]>() t = Concat<axis=0>(b, k) "
        "g = Sign(x) y = Tile(g, t)",
        "[B*B, 2*S, 12]",
    ),
    "swapped": ("y = Transpose<perm=[2,0,1]>(x)", "[12, B, S]"),
    "product of matrices": ("t = Transpose<perm=[0,2,1]>(x) y = MatMul(x, t)", "[B, S, S]"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_follows_shapes(name: str, parse: Any) -> None:
    body, expected = SHAPES[name]
    kind = "int64" if "Range" in body else "float"
    rank = expected.count(",") + 1
    graph = parse(
        f"(float[B,S,12] x, float[B,T,12] w, float[B,U,12] v) => ({kind}[{','.join('abcde'[:rank])}] y) {{ {body} }}"
    )
    for tensor in graph.outputs:
        tensor.shape = None
    infer_shapes(graph)
    shape = Dimensions(graph).of(graph.outputs[0])
    assert shape is not None
    assert f"[{', '.join(map(str, shape))}]" == expected


def test_a_name_that_is_a_sum_or_a_multiple_is_one() -> None:
    assert Dimension.named("past + new") == Dimension.of("past") + Dimension.of("new")
    assert Dimension.named("past + 1") == Dimension.of("past + 1"), "optimum writes it where more than one may follow"
    assert Dimension.named("4*batch") == Dimension.of(4) * Dimension.of("batch")
    assert Dimension.named("batch*4") == Dimension.of("batch*4"), "no exporter writes it so"
    assert Dimension.named("max(a, b) + c") == Dimension.of("max(a, b) + c")


def test_arithmetic_is_that_of_polynomials() -> None:
    b, s, two = Dimension.of("b"), Dimension.of("s"), Dimension.of(2)
    assert (b + s) * two == two * s + b * two
    assert (b * s * two).over(s) == b + b
    assert b.over(s) is None
    assert (b + s).over(b + s) is None, "only one product divides"
    assert (two * b).over(Dimension.of(3)) is None
    assert (b + b * Dimension.of(-1)).number == 0
    assert not (b * Dimension.of(-1)).positive
    assert str(two * b * s + Dimension.of(3)) == "2*b*s + 3"
