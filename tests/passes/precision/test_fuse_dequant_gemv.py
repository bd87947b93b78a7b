from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from llmc.compiler.session import Session
from llmc.passes.base import Context, Skip
from llmc.passes.graph import Array, Constant, Graph, Node, Tensor, Variable, Weights, copy_graph, from_model, to_model
from llmc.passes.precision.fuse_dequant_gemv import FuseDequantGemv

PASS = FuseDequantGemv(plugins=("llmc",))
K, N, BLOCK = 64, 6, 32
TOLERANCE = {np.float32: 1e-5, np.float16: 2.0**-9}
"""Of the largest value: sums of 64 products in another order; in float16 two roundings besides."""


def kept(values: Array) -> Weights:
    """As a pass leaves them: those of 4 bits two a byte."""
    return Context().keep(onnx.helper.np_dtype_to_tensor_dtype(values.dtype), values)


def model(
    rows: tuple[Any, ...] = (3,),
    op: str = "MatMul",
    dtype: Any = np.float32,
    levels: Any = ml_dtypes.int4,
    axis: int = 0,
    zero: int | None = None,
    depth: int = K,
    bias: bool = False,
    **attributes: Any,
) -> Graph:
    rng = np.random.default_rng(0)
    transposed = bool(attributes.get("transB"))
    shape, blocks = (depth, N), (-(-depth // BLOCK), N)
    if axis == 1 and not transposed:
        shape, blocks = (K, N * BLOCK), (K, N)
    values: Array = rng.integers(0, 8, shape[::-1] if transposed else shape).astype(levels)
    scales = rng.uniform(0.5, 1, blocks[::-1] if transposed else blocks).astype(dtype)
    x = Variable("x", np.dtype(dtype), [*rows, depth])
    given: list[Tensor] = [Constant("w", kept(values)), Constant("s", scales)]
    if zero is not None:
        given.append(Constant("z", kept(np.full(scales.shape, zero, levels))))
    made, y = Variable("w_float", np.dtype(dtype)), Variable("y", np.dtype(dtype), [*rows, shape[1]])
    nodes = [Node("DequantizeLinear", "d", {"axis": int(transposed) or axis, "block_size": BLOCK}, given, [made])]
    factors: list[Tensor] = [x, made, *[Constant("b", np.ones(shape[1], dtype))] * bias]
    nodes.append(Node(op, "product", attributes, factors, [y]))
    graph = Graph(nodes, [x], [y], opset=21, ir_version=11)
    return from_model(to_model(graph))


FIRES = {
    "one row": model((1,)),
    "rows in two axes": model((2, 8)),
    "float16": model(dtype=np.float16),
    "Gemm": model(op="Gemm"),
    "Gemm, weight transposed": model(op="Gemm", transB=1),
    "zero points that are 0": model(zero=0),
}

LEAVES_ALONE = {
    "17 rows": (model((17,)), "it has 17 rows and more; the kernel is made for 1 to 16"),
    "symbolic": (
        model(("batch", 1)),
        "the number of its rows is not fixed: symbolic_rows takes it for an engine that only decodes",
    ),
    "int8": (model(levels=np.int8), "its weight is int8, the operator's int4"),
    "unsigned": (model(levels=ml_dtypes.uint4), "its weight is uint4, the operator's int4"),
    "zero points": (model(zero=2), "its weight has zero points"),
    "short block": (model(depth=48), "its 48 input channels are not full blocks of 32"),
    "blocks along the output": (model(axis=1), "the blocks of its weight do not run along the axis that is summed"),
    "bias": (model(op="Gemm", bias=True), "it transposes or scales its first factor, or adds a bias"),
    "scaled": (model(op="Gemm", alpha=0.5), "it transposes or scales its first factor, or adds a bias"),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str) -> None:
    fires(FIRES[name], PASS, FIRES[name].inputs[0].shape)


def test_rows_that_are_not_fixed_are_taken_where_asked_for() -> None:
    fires(model(("batch", 1)), FuseDequantGemv(plugins=("llmc",), symbolic_rows=True), [4, 1, K])


def fires(graph: Graph, step: FuseDequantGemv, shape: Any) -> None:
    fused = copy_graph(graph)
    (rewrite,) = step.run(fused, Context()).rewrites
    assert (rewrite.number, rewrite.node) == (1, "product")
    assert [(node.op, node.attrs) for node in fused.nodes] == [("DequantGemv", {"block": BLOCK})]
    dtype = graph.inputs[0].dtype
    feeds = {"x": np.random.default_rng(1).standard_normal(shape).astype(dtype)}
    expected = Session(graph).run(feeds)["y"].astype(np.float64)
    found = Session(from_model(to_model(fused))).run(feeds)["y"].astype(np.float64)
    bound = TOLERANCE[dtype.type] * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str) -> None:
    graph, reason = LEAVES_ALONE[name]
    result = PASS.run(copy_graph(graph), Context())
    assert not result.rewrites
    assert [miss.reason for miss in result.near_misses] == [reason]


def test_a_target_without_the_plugin_keeps_the_standard_operators() -> None:
    with pytest.raises(Skip, match=r"the target runs no plugin 'llmc'"):
        FuseDequantGemv().run(model(), Context())
