"""The pass `fuse-matmul-nbits`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import onnx
from pydantic import Field

from llmc.passes.base import Context, Pass, PassResult, Safety
from llmc.passes.graph import (
    Array,
    Constant,
    Derived,
    Graph,
    Node,
    Variable,
    dtype_name,
    load_values,
    metadata,
    onnx_dtype,
)
from llmc.passes.precision.weight_blocks import (
    WeightBlocks,
    bias_of,
    fuse_products,
    is_transposed,
    problem_of_axis,
)

MICROSOFT = "com.microsoft"
BITS: dict[int, tuple[int, int]] = {
    onnx.TensorProto.INT4: (4, 8),
    onnx.TensorProto.UINT4: (4, 0),
    onnx.TensorProto.INT8: (8, 128),
    onnx.TensorProto.UINT8: (8, 0),
}
"""Type of the levels → their bits, and what makes them unsigned, as MatMulNBits has them."""
SMALLEST = 16
"""Values of a block; ONNX Runtime takes powers of 2 from here on."""


class FuseMatmulNbits(Pass):
    """Fuses a product with weights dequantized in blocks to MatMulNBits, which ONNX Runtime has kernels for.

    MatMul(A, DequantizeLinear(W, s, z, axis=0, block_size)), A [..., K] float32 or float16, W int4, uint4, int8 or
    uint8 [K, N], s [K / block_size, N] → com.microsoft MatMulNBits(A, W' uint8 [N, K / block_size, bytes], s' [N, K /
    block_size], z'). Gemm too, either way round, with its bias. W' holds the values of a block low bits first, with 8
    (128 for 8 bits) added where W is signed.

    **Safety:** tolerance. The same arithmetic in another order (float32: 1e-5 of the largest value). With
    `accuracy_level` 4 ONNX Runtime may round A to int8 in blocks, 1e-2 of the largest value.

    Source: ONNX Runtime, ContribOperators.md, MatMulNBits.
    """

    after: ClassVar[tuple[str, ...]] = ("quantize-weights",)
    targets: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")
    safety: ClassVar[Safety] = "tolerance"

    accuracy_level: Literal[0, 1, 2, 3, 4] = Field(
        0, description="What ONNX Runtime may compute in: 1 float32, 2 float16, 3 bfloat16, 4 int8; 0 is its choice."
    )

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = fuse_products(graph, context, "FuseMatmulNbits", _problem, self._fused)
        if result.rewrites:
            graph.import_domains = [d for d in graph.import_domains or [] if d.domain != MICROSOFT]
            graph.import_domains.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        return result

    def _fused(self, node: Node, dequantize: Node, fresh: Callable[[str], str]) -> Node:
        """MatMulNBits in the place of `node`, whose results it takes over."""
        layout = _Layout(node, dequantize)
        name = dequantize.inputs[0].name
        scale = Constant(fresh(f"{name}_scales"), layout.scales())
        inputs = [node.inputs[0], Constant(fresh(f"{name}_packed"), layout.packed()), scale]
        zero, bias = layout.zero_points(), bias_of(node)
        if zero is not None:
            inputs.append(Constant(fresh(f"{name}_zero_points"), zero))
        if bias is not None:
            empty = Variable.empty()
            inputs += [*[empty] * (5 - len(inputs)), bias]
        attributes = {"K": layout.depth, "N": layout.rows, "bits": layout.bits, "block_size": layout.block}
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        made = Node("MatMulNBits", node.name, attributes, inputs, list(node.outputs), domain=MICROSOFT)
        metadata(made).update(metadata(node))
        return made


def _problem(node: Node, dequantize: Node) -> str | None:
    """Why MatMulNBits cannot say this product."""
    problem = problem_of_axis(node, dequantize)
    if problem is not None:
        return problem
    levels, block = dequantize.inputs[0], dequantize.attrs["block_size"]
    if onnx_dtype(levels) not in BITS:
        return f"its weight is {dtype_name(onnx_dtype(levels))}"
    if block < SMALLEST or block & (block - 1):
        return f"its blocks are of {block} values; ONNX Runtime takes powers of 2 from {SMALLEST}"
    if node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1.0:
        return "it transposes or scales its first factor"
    bias, channels = bias_of(node), levels.shape[0 if is_transposed(node) else 1]
    if bias is not None and (node.attrs.get("beta", 1.0) != 1.0 or tuple(bias.shape or ()) != (channels,)):
        return "its bias is not one number for each output channel"
    return None


class _Layout(WeightBlocks):
    """A weight dequantized in blocks, as MatMulNBits has it."""

    def __init__(self, node: Node, dequantize: Node) -> None:
        super().__init__(node, dequantize)
        self.bits, self.offset = BITS[onnx_dtype(self.levels)]

    def packed(self) -> Derived:
        """uint8 [rows, blocks, bytes of a block]; computed whenever it is asked for."""
        shape = (self.rows, -(-self.depth // self.block), self.block * self.bits // 8)
        return Derived(onnx.TensorProto.UINT8, shape, lambda: self._packed().reshape(shape))

    def _packed(self) -> Array:
        rows = self._unsigned(self.levels)
        short = -self.depth % self.block
        if short:
            rows = np.pad(rows, ((0, 0), (0, short)))
        return _pack(rows) if self.bits == 4 else rows

    def zero_points(self) -> Array | None:
        """uint8 [rows, bytes of a row]; None where they are in the middle, which is what MatMulNBits takes then."""
        if self.zero is None and self.offset:
            return None
        values = np.zeros(self.scales().shape, np.uint8) if self.zero is None else self._unsigned(self.zero)
        if (values == 1 << (self.bits - 1)).all():
            return None
        return _pack(np.pad(values, ((0, 0), (0, values.shape[-1] % 2)))) if self.bits == 4 else values

    def _unsigned(self, levels: Constant) -> Array:
        return (self.by_rows(load_values(levels)).astype(np.int16) + self.offset).astype(np.uint8)


def _pack(values: Array) -> Array:
    """uint8 [rows, n] below 16 → two a byte, the first in the low bits: [rows, n / 2]."""
    packed: Array = values[:, 0::2] | (values[:, 1::2] << 4)
    return packed
