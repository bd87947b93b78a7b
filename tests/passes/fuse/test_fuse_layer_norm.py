from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.fuse.fuse_layer_norm import FuseLayerNorm
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
    ).format(
        shape=keys.get("shape", "N,4"), more=keys.get("more", ""), n=keys.get("n", "4"), g=keys.get("g", "1,2,3,4")
    )
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

HEAD = (
    "(float[N,4] x) => (float[N,4] y) <float e = {0.00001}, float half = {0.5}, float one = {1}, "
    "float[4] g = {1,2,3,4}, float[4] b = {4,3,2,1}> { m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) "
)
VARIANCE = "q = Mul(d, d) v = ReduceMean<axes=[-1]>(q) w = Add(v, e) "
AFFINE = "s = Mul(n, g) y = Add(s, b) }"

FIRES_OTHERWISE = {
    "mean of squares less square of mean": (
        HEAD + "q = Mul(x, x) p = ReduceMean<axes=[-1]>(q) o = Mul(m, m) v = Sub(p, o) w = Add(v, e) r = Sqrt(w) "
        "n = Div(d, r) " + AFFINE
    ),
    "root by Pow": HEAD + VARIANCE + "r = Pow(w, half) n = Div(d, r) " + AFFINE,
    "Reciprocal": HEAD + VARIANCE + "r = Sqrt(w) i = Reciprocal(r) n = Mul(d, i) " + AFFINE,
    "one over the root": HEAD + VARIANCE + "r = Sqrt(w) i = Div(one, r) n = Mul(d, i) " + AFFINE,
    "Keras": (
        HEAD + VARIANCE + "r = Sqrt(w) i = Reciprocal(r) k = Mul(i, g) u = Mul(x, k) z = Mul(m, k) o = Sub(b, z) "
        "y = Add(u, o) }"
    ),
    "rows of a matrix": (
        "(float[2,2,2] x) => (float[2,2,2] y) <float e = {0.00001}, float[1,4] g = {1,2,3,4}, "
        "float[1,4] b = {4,3,2,1}, int64[3] back = {2,2,2}> { f = Flatten<axis=1>(x) m = ReduceMean<axes=[1]>(f) "
        "q = Mul(f, f) p = ReduceMean<axes=[1]>(q) o = Mul(m, m) v = Sub(p, o) w = Add(v, e) r = Sqrt(w) "
        "d = Sub(f, m) n = Div(d, r) s = Mul(n, g) z = Add(s, b) y = Reshape(z, back) }"
    ),
}

CASTS = (
    "(float16[N,4] x) => (float16[N,4] y) <float two = {2}, float e = {0.00001}, float[4] g = {1,2,3,4}, "
    "float[4] b = {1,0,-1,SMALL}> { c = Cast<to=1>(x) m = ReduceMean<axes=[-1]>(c) d = Sub(c, m) q = Pow(d, two) "
    "v = ReduceMean<axes=[-1]>(q) w = Add(v, e) r = Sqrt(w) n = Div(d, r) TAIL }"
)
HALF_BEHIND = "h = Cast<to=10>(n) i = Cast<to=10>(g) j = Cast<to=10>(b) s = Mul(h, i) y = Add(s, j)"
ALL_IN_FLOAT = "s = Mul(n, g) t = Add(s, b) y = Cast<to=10>(t)"

LEAVES_ALONE = {
    "float64": (
        model().replace("float[", "double[").replace("float ", "double "),
        "the type of 'x' is float64, the fused operator computes in float32",
    ),
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


@pytest.mark.parametrize("name", FIRES_OTHERWISE)
def test_fires_on_other_spellings(name: str, fires: Any) -> None:
    fires(FuseLayerNorm(), FIRES_OTHERWISE[name], ["LayerNormalization"], opset=17)


def test_scale_along_another_axis_stays_outside(fires: Any) -> None:
    text = model(shape="4,4").replace("float[4] g", "float[4,1] g")
    fires(FuseLayerNorm(), text, ["LayerNormalization", "Mul", "Add"], opset=17)


@pytest.mark.parametrize(
    ("tail", "small", "left"),
    [
        pytest.param(HALF_BEHIND, "2", ["LayerNormalization"], id="affine in 16 bits"),
        pytest.param(ALL_IN_FLOAT, "2", ["LayerNormalization"], id="affine in float32"),
        pytest.param("y = Cast<to=10>(n)", "2", ["LayerNormalization"], id="plain"),
        # 1e-9 is no float16: scale and bias stay in float32
        pytest.param(ALL_IN_FLOAT, "0.000000001", ["Cast", "LayerNormalization", "Cast"], id="fine bias"),
    ],
)
def test_casts_around_it(tail: str, small: str, left: list[str], parse: Any, random_feeds: Any) -> None:
    graph = parse(CASTS.replace("SMALL", small).replace("TAIL", tail), opset=17)
    fused = copy_graph(graph)
    FuseLayerNorm().run(fused, Context())
    assert [node.op for node in fused.nodes if node.outputs[0].name not in ("i", "j")] == left
    feeds = random_feeds(graph)
    expected, found = (Session(g).run(feeds)["y"].astype(np.float64) for g in (graph, fused))
    # three roundings to float16, 2^-11 each, of values below 8
    np.testing.assert_allclose(found, expected, rtol=0, atol=3 * 8 * 2.0**-11)


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
