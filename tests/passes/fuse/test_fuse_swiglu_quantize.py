from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Skip
from llmc.passes.fuse.fuse_swiglu_quantize import FuseSwigluQuantize
from llmc.passes.graph import copy_graph

PASS = FuseSwigluQuantize(plugins=("llmc",))
SWISH = "a = Swish(g) m = Mul(a, u) "
SIGMOID = "o = Sigmoid(g) a = Mul(g, o) m = Mul(u, a) "
QUANTIZE = "q = QuantizeLinear(m, s, z) y = DequantizeLinear(q, s, z)"


def model(
    body: str, dtype: str = "float", levels: str = "int8", zero: int = 0, more: str = "", up: str = "N,5,4"
) -> str:
    text = "({T}[N,5,4] g, {T}[{up}] u) => ({T}[N,5,4] y" + more + ") <{T} s = {0.02}, {Z} z = {{zero}}> {" + body + "}"
    return text.replace("{T}", dtype).replace("{Z}", levels).replace("{zero}", str(zero)).replace("{up}", up)


FIRES = {"Swish": model(SWISH + QUANTIZE), "Sigmoid": model(SIGMOID + QUANTIZE)}

LEAVES_ALONE = {
    "unsigned levels": (
        model(SWISH + QUANTIZE, levels="uint8"),
        "it quantizes to uint8, the operator to int8 or float8e4m3fn",
    ),
    "zero point": (model(SWISH + QUANTIZE, zero=1), "its zero point is not a single 0"),
    "broadcast": (model(SWISH + QUANTIZE, up="5,4"), "'g' and 'u' are not known to have the same shape"),
    "product is read again": (
        model(SWISH + QUANTIZE, more=", {T}[N,5,4] m"),
        "'m', inside the pattern, is an output of the graph",
    ),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str, fires: Any) -> None:
    fires(PASS, FIRES[name], ["SwiGLUQuantize", "DequantizeLinear"], opset=24)


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str, leaves_alone: Any) -> None:
    leaves_alone(PASS, *LEAVES_ALONE[name], opset=24)


@pytest.mark.parametrize("product", [SWISH, SIGMOID])
def test_of_float16_a_level_may_be_the_one_beside(product: str, parse: Any, random_feeds: Any, in_float16: Any) -> None:
    """The product is not rounded to float16 any more."""
    text = model(product + "y = QuantizeLinear(m, s, z)").replace("float[N,5,4] y", "int8[N,5,4] y")
    graph = in_float16(parse(text, opset=24))
    fused = copy_graph(graph)
    assert len(PASS.run(fused, Context()).rewrites) == 1
    feeds = random_feeds(graph)
    off = np.abs(Session(fused).run(feeds)["y"].astype(int) - Session(graph).run(feeds)["y"].astype(int))
    assert off.max() <= 1


def test_a_target_without_the_plugin_keeps_the_standard_operators(parse: Any) -> None:
    with pytest.raises(Skip, match=r"the target runs no plugin 'llmc' \(target.plugins\): standard operators stay"):
        FuseSwigluQuantize().run(parse(FIRES["Swish"], opset=24), Context())
