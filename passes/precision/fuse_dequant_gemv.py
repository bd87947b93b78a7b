"""The pass `fuse-dequant-gemv`."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import ClassVar

import ml_dtypes
import onnx
from pydantic import Field

from llmc.passes.base import Context, PassResult, Safety
from llmc.passes.graph import (
    DOMAIN,
    Array,
    Constant,
    Derived,
    Graph,
    Node,
    dtype_name,
    load_values,
    metadata,
    onnx_dtype,
    shape_of,
)
from llmc.passes.plugins import PluginPass
from llmc.passes.precision.weight_blocks import WeightBlocks, bias_of, fuse_products, problem_of_axis

MOST_ROWS = 16
"""Of activations, that the kernel is made for."""


class FuseDequantGemv(PluginPass):
    """Fuses a product of a few rows with INT4 weights in blocks to DequantGemv, for llmc's plugin.

    MatMul(x, DequantizeLinear(W, s, axis=0, block_size)), x [..., K] of 1 to 16 rows, float32, float16 or bfloat16, W
    int4 [K, N], K even, s [K / block_size, N] → llmc DequantGemv(x, Wᵀ, sᵀ, block); Gemm without bias too, either way
    round. The body of standard operators goes with the model.

    **Safety:** tolerance; the same products, summed in another order (float32: 1e-5 of the largest value).

    Source: kernels/dequant_gemv.
    """

    after: ClassVar[tuple[str, ...]] = ("quantize-weights", "convert-fp16", "convert-bf16")
    safety: ClassVar[Safety] = "tolerance"

    symbolic_rows: bool = Field(
        False,
        description="Take products whose number of rows is not fixed too: for engines that decode and nothing else.",
    )

    def run(self, graph: Graph, context: Context) -> PassResult:
        self.needs_plugin()
        context.infer_shapes(graph)
        return fuse_products(graph, context, "FuseDequantGemv", self._problem, _fused)

    def _problem(self, node: Node, dequantize: Node) -> str | None:
        """Why DequantGemv cannot say this product, or would be slow."""
        problem = problem_of_axis(node, dequantize)
        if problem is not None:
            return problem
        weight = WeightBlocks(node, dequantize)
        if onnx_dtype(weight.levels) != onnx.TensorProto.INT4:
            return f"its weight is {dtype_name(onnx_dtype(weight.levels))}, the operator's int4"
        if weight.zero is not None and load_values(weight.zero).astype(int).any():
            return "its weight has zero points"
        if weight.depth % weight.block or weight.depth % 2:
            return f"its {weight.depth} input channels are not full blocks of {weight.block}"
        if node.op == "Gemm" and (
            bias_of(node) is not None or node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1.0
        ):
            return "it transposes or scales its first factor, or adds a bias"
        rows = (shape_of(node.inputs[0]) or (None,))[:-1]
        fixed = prod(size for size in rows if isinstance(size, int))
        if fixed > MOST_ROWS or (len(rows) > 0 and None in rows):
            return f"it has {fixed} rows and more; the kernel is made for 1 to {MOST_ROWS}"
        if not self.symbolic_rows and any(isinstance(size, str) for size in rows):
            return "the number of its rows is not fixed: symbolic_rows takes it for an engine that only decodes"
        return None


def _fused(node: Node, dequantize: Node, fresh: Callable[[str], str]) -> Node:
    """DequantGemv in the place of `node`, whose results it takes over."""
    weight, name = WeightBlocks(node, dequantize), dequantize.inputs[0].name

    def levels() -> Array:
        rows: Array = weight.by_rows(load_values(weight.levels)).astype(ml_dtypes.int4)
        return rows

    by_rows = Derived(onnx.TensorProto.INT4, (weight.rows, weight.depth), levels)
    inputs = [
        node.inputs[0],
        Constant(fresh(f"{name}_rows"), by_rows),
        Constant(fresh(f"{name}_scales"), weight.scales()),
    ]
    made = Node("DequantGemv", node.name, {"block": weight.block}, inputs, list(node.outputs), domain=DOMAIN)
    metadata(made).update(metadata(node))
    return made
