from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.fuse_layer_norm import FuseLayerNorm
from llmc.passes.graph import constants, copy_graph

BODY = (
    "m = ReduceMean<axes=[{axes}]>(x) d = Sub(x, m) q = {square} v = ReduceMean<axes=[{axes}]>(d2) "
    "w = Add(v, e) r = Sqrt(w) n = Div(d, r)"
)
SQUARE = {"pow": "Pow(d, two)", "mul": "Mul(d, d)"}


def model(square: str = "pow", axes: str = "-1", affine: str = "s = Mul(n, g) y = Add(s, b)", **keys: str) -> str:
    body = BODY.replace("q = {square}", "d2 = {square}").format(axes=axes, square=SQUARE[square])
    head = (
        "(float[{shape}] x) => (float[{shape}] y{more}) <float two = {{2}}, float e = {{0.00001}}, "
        "float[{n}] g = {{{g}}}, float[{n}] b = {{{g}}}>"
    ).format(shape=keys.get("shape", "N,4"), more=keys.get("more", ""), n=keys.get("n", "4"), g=keys.get("g", "1,2,3,4"))
    return f"{head} {{ {body} {affine} }}"


FIRES = {
    "pow": model(),
    "mul": model("mul"),
    "bias first": model(affine="s = Mul(g, n) y = Add(b, s)"),
    "no bias": model(affine="y = Mul(n, g)"),
    "plain": model(affine="y = Identity(n)"),
    "last axis by its number": model(axes="1"),
    "scale of one element": model(n="1", g="2", affine="s = Mul(n, g) y = Add(s, b)"),
}

LEAVES_ALONE = {
    "first axis": (model(axes="0"), "the mean is over axes [0] of 'x', not over its last ones"),
    "mean is an output": (model(more=", float[N,1] m"), "'m', inside the pattern, is an output of the graph"),
    "variance used elsewhere": (
        model(affine="s = Mul(n, g) y = Add(s, b) z = Relu(v)", more=", float[N,1] z"),
        "'v', inside the pattern, is also used by Relu 'z'",
    ),
    "cube": (model().replace("two = {2}", "two = {3}"), "'two' is 3, LayerNormPlain needs 2"),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, parse: Any, random_feeds: Any) -> None:
    graph = parse(FIRES[name], opset=17)
    fused = copy_graph(graph)
    result = FuseLayerNorm().run(fused, Context())
    assert [n.op for n in fused.nodes].count("LayerNormalization") == 1
    assert not {"ReduceMean", "Sqrt", "Div", "Pow"} & {n.op for n in fused.nodes}
    assert len(result.rewrites) == 1
    feeds = random_feeds(graph)
    # float32 on values of order 4: a dozen roundings of 2^-24 each, amplified by at most 1/σ
    np.testing.assert_allclose(Session(fused).run(feeds)["y"], Session(graph).run(feeds)["y"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, parse: Any) -> None:
    text, reason = LEAVES_ALONE[name]
    graph = parse(text, opset=17)
    result = FuseLayerNorm().run(graph, Context())
    assert result.rewrites == []
    assert reason in [miss.reason for miss in result.near_misses]


def test_overflow_of_the_square_in_float16_is_cured(parse: Any) -> None:
    graph = parse(model(), opset=17)
    for tensor in (*graph.inputs, *graph.outputs):
        tensor.dtype = np.dtype(np.float16)
    for constant in constants(graph):
        constant.values = constant.values.astype(np.float16)
    fused = copy_graph(graph)
    FuseLayerNorm().run(fused, Context())
    feeds = {"x": np.array([[-1000.0, 0.0, 1000.0, 2000.0]], np.float16)}
    # 1500² = 2.25e6 is beyond float16's 65504: the long form divides by infinity and leaves the bias alone
    np.testing.assert_array_equal(Session(graph).run(feeds)["y"], [[1, 2, 3, 4]])
    exact = feeds["x"].astype(np.float64) - 500.0
    exact = exact / np.sqrt((exact**2).mean() + 1e-5) * [1, 2, 3, 4] + [1, 2, 3, 4]
    # one rounding to float16 of values below 16: 2^-11 * 16
    np.testing.assert_allclose(Session(fused).run(feeds)["y"].astype(np.float64), exact, rtol=0, atol=2**-7)
