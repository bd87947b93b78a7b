from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Skip
from llmc.passes.fuse.fuse_add_rms_norm_quantize import FuseAddRMSNormQuantize
from llmc.passes.graph import copy_graph

PASS = FuseAddRMSNormQuantize(plugins=("llmc",))
NORM = "t = Add(x, r) n = RMSNormalization<epsilon=1e-5>(t, w) "
LAYER = "t = Add(x, r) n = LayerNormalization<epsilon=1e-5>(t, w, b) "
QUANTIZE = "q = QuantizeLinear(n, s, z) y = DequantizeLinear(q, s, z)"


def model(
    body: str, dtype: str = "float", levels: str = "int8", zero: int = 0, more: str = ", {T}[N,5,4] t", inputs: str = ""
) -> str:
    text = (
        "({T}[N,5,4] x, {T}[N,5,4] r" + inputs + ") => ({T}[N,5,4] y" + more + ") <{T}[4] w = {1.5, 0.5, 1, 2}, "
        "{T}[4] b = {0.25, 0, -1, 1}, {T}[1,4] v = {1, 2, 3, 4}, {T} s = {0.02}, {Z} z = {{zero}}> {" + body + "}"
    )
    return text.replace("{T}", dtype).replace("{Z}", levels).replace("{zero}", str(zero))


FIRES = {
    "RMS": (model(NORM + QUANTIZE), "AddRMSNormQuantize"),
    "RMS, the sum not read again": (model(NORM + QUANTIZE, more=""), "AddRMSNormQuantize"),
    "RMS, axis by number": (model(NORM.replace("<eps", "<axis=2, eps") + QUANTIZE), "AddRMSNormQuantize"),
    "layer": (model(LAYER + QUANTIZE), "AddLayerNormQuantize"),
    "layer in a chain": (model(LAYER + QUANTIZE + " o = Relu(t)", more=", {T}[N,5,4] o"), "AddLayerNormQuantize"),
}

LEAVES_ALONE = {
    "unsigned levels": (
        model(NORM + QUANTIZE, levels="uint8"),
        "it quantizes to uint8, the operator to int8 or float8e4m3fn",
    ),
    "zero point": (model(NORM + QUANTIZE, zero=3), "its zero point is not a single 0"),
    "two axes": (
        model(LAYER.replace("<eps", "<axis=1, eps").replace("w, b", "v, v") + QUANTIZE),
        "the normalization is over more than the last axis",
    ),
    "broadcast": (
        model(NORM.replace("Add(x, r)", "Add(x, c)") + QUANTIZE, inputs=", {T}[1,5,4] c"),
        "'x' and 'c' are not known to have the same shape",
    ),
    "normalized values are read again": (
        model(NORM + QUANTIZE, more=", {T}[N,5,4] n"),
        "'n', inside the pattern, is an output of the graph",
    ),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, fires: Any) -> None:
    text, operator = FIRES[name]
    more = ["Relu"] if "chain" in name else []
    fires(PASS, text, [operator, "DequantizeLinear", *more], opset=23)


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, leaves_alone: Any) -> None:
    leaves_alone(PASS, *LEAVES_ALONE[name], opset=23)


def test_rows_that_the_kernel_cannot_hold_are_left_alone(leaves_alone: Any) -> None:
    wide = f"float[8200] w = {{{', '.join('1' * 8200)}}}"
    text = model(NORM + QUANTIZE).replace("float[4] w = {1.5, 0.5, 1, 2}", wide).replace("5,4]", "5,8200]")
    leaves_alone(PASS, text, "its rows are of 8200 values; the kernel takes up to 8192", opset=23)


@pytest.mark.parametrize("normal", [NORM, LAYER])
def test_of_float16_a_level_may_be_the_one_beside(normal: str, parse: Any, random_feeds: Any, in_float16: Any) -> None:
    """The normalized values, and the scale's products, are not rounded to float16 any more."""
    text = model(normal + "y = QuantizeLinear(n, s, z)").replace("float[N,5,4] y", "int8[N,5,4] y")
    graph = in_float16(parse(text, opset=23))
    fused = copy_graph(graph)
    assert len(PASS.run(fused, Context()).rewrites) == 1
    feeds = random_feeds(graph)
    before, after = Session(graph).run(feeds), Session(fused).run(feeds)
    np.testing.assert_array_equal(after["t"], before["t"])
    off = np.abs(after["y"].astype(int) - before["y"].astype(int))
    assert off.max() <= 1


def test_a_target_without_the_plugin_keeps_the_standard_operators(parse: Any) -> None:
    with pytest.raises(Skip, match=r"the target runs no plugin 'llmc' \(target.plugins\): standard operators stay"):
        FuseAddRMSNormQuantize().run(parse(FIRES["RMS"][0], opset=23), Context())
