from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context
from llmc.passes.fuse.split_packed import SplitPacked
from llmc.passes.graph import Graph, copy_graph, infer_shapes, to_model

PICK = (
    "i0 = Constant<value = int64 {0}>() i1 = Constant<value = int64 {1}>() i2 = Constant<value = int64 {-1}>() "
    "a = Gather(t, i0) b = Gather(t, i1) c = Gather(t, i2)"
)
STACK = "h = Constant<value_ints = [0, 0, 3, 4]>() r = Reshape(x, h) "
TORCH = (
    f"{STACK} e0 = Constant<value_ints = [0]>() e3 = Constant<value_ints = [3]>() u = Unsqueeze(r, e0) "
    f"v = Transpose<perm = [3, 1, 2, 0, 4]>(u) t = Squeeze(v, e3) {PICK}"
)
OUTPUTS = "float[S,B,4] a, float[S,B,4] b, float[S,B,4] c"
FIRES = {
    "as torch.nn.MultiheadAttention does": TORCH,
    "with one Transpose": f"{STACK} t = Transpose<perm = [2, 0, 1, 3]>(r) {PICK}",
    "where it stands": f"{STACK} t = Identity(r) {PICK.replace('Gather(', 'Gather<axis = 2>(')}",
    "parts in another order": TORCH.replace(
        "a = Gather(t, i0) b = Gather(t, i1)", "b = Gather(t, i1) a = Gather(t, i0)"
    ),
}
STAYS = {
    "a part is taken twice": (
        TORCH.replace("Gather(t, i2)", "Gather(t, i1)"), OUTPUTS, ["of the 3 parts not each is taken once"],
    ),
    "parts turned around": (
        f"{STACK} t = Transpose<perm = [2, 1, 0, 3]>(r) {PICK.replace('a = G', '[g] a = G')}",
        OUTPUTS.replace("S,B", "B,S"),
        ["Gather 'g' takes along another axis, or parts whose axes are in another order"],
    ),
    "along the width": (
        f"{STACK} t = Transpose<perm = [3, 0, 1, 2]>(r) {PICK.replace('a = G', '[g] a = G')}",
        OUTPUTS.replace("4", "3"),
        ["Gather 'g' takes along another axis, or parts whose axes are in another order"],
    ),
    "several parts at once": (
        f"{TORCH.replace('a = G', '[g] a = G')}".replace("value = int64 {0}", "value = int64[1] {0}"),
        OUTPUTS.replace("float[S,B,4] a", "float[1,S,B,4] a"), ["Gather 'g' takes not one part that is known"],
    ),
    "the stack is an output": (
        TORCH, f"{OUTPUTS}, float[3,S,B,4] t", ["'t', the parts side by side, is an output of the graph"],
    ),
    "the stack is used": (f"{TORCH} d = Relu(t)", f"{OUTPUTS}, float[3,S,B,4] d", []),
    "other axes are split": (
        f"h = Constant<value_ints = [0, -1, 3, 4]>() y = Transpose<perm = [1, 0, 2]>(x) o = Shape(x) r = Reshape(y, h) "
        f"t = Transpose<perm = [2, 1, 0, 3]>(r) {PICK}", OUTPUTS,
        ["Gather '' takes along another axis, or parts whose axes are in another order"],
    ),
}  # fmt: skip


def build(parse: Any, body: str, outputs: str = OUTPUTS) -> Graph:
    graph: Graph = parse(f"(float[S,B,12] x) => ({outputs}) {{ {body} }}")
    infer_shapes(graph)
    return graph


@pytest.mark.parametrize("name", FIRES)
@pytest.mark.parametrize("opset", [13, 20])
def test_fires(name: str, opset: int, parse: Any) -> None:
    graph: Graph = parse(f"(float[S,B,12] x) => ({OUTPUTS}) {{ {FIRES[name]} }}", opset=opset)
    changed = copy_graph(graph)
    result = SplitPacked().run(changed, Context())
    assert [rewrite.detail for rewrite in result.rewrites] == ["3 parts"], result.near_misses
    assert [node.op for node in changed.nodes] == ["Split"]
    onnx.checker.check_model(to_model(changed), full_check=True)
    x = np.random.default_rng(0).standard_normal((5, 2, 12)).astype(np.float32)
    found = Session(changed).run({"x": x})
    for output, expected in Session(graph).run({"x": x}).items():
        np.testing.assert_array_equal(found[output], expected)


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str, parse: Any) -> None:
    body, outputs, reasons = STAYS[name]
    graph = build(parse, body, outputs)
    result = SplitPacked().run(graph, Context())
    assert result.rewrites == []
    assert [miss.reason.replace("'a'", "''") for miss in result.near_misses] == reasons
