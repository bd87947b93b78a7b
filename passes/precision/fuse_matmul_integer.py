"""The pass `fuse-matmul-integer`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from llmc.passes.base import Context, NearMiss, Pass, PassResult, Safety
from llmc.passes.graph import (
    Array,
    Constant,
    Derived,
    Graph,
    Node,
    Tensor,
    Variable,
    fresh_names,
    load_values,
    metadata,
    module_of,
    onnx_dtype,
    outputs_of_scopes,
    scopes,
)
from llmc.passes.placement import Placement
from llmc.passes.precision.fuse_matmul_nbits import MICROSOFT
from llmc.passes.precision.qdq import Grid, grid, producer

FLOAT32 = np.dtype(np.float32)
MIDDLE = 128
"""What makes int8 levels unsigned."""


class FuseMatmulInteger(Pass):
    """Fuses a product of Q/DQ activations and weights to MatMulIntegerToFloat, ONNX Runtime's INT8 kernel for CPUs.

    Add(MatMul(DQ(Q(x, s, 0)), DQ(W int8 [K, N], t [N])), b [N]), x float32 [..., K] → com.microsoft
    MatMulIntegerToFloat(Q(x, s, 128) uint8, W, s, t, 128, 0, b); Gemm too, W either way round. ONNX Runtime fuses such
    products itself where x is uint8 alone, and never their biases. All products of one x share its levels. Stands after
    quantize-int8; TensorRT takes Q/DQ only.

    **Safety:** tolerance. The same levels, summed in integers instead of float32: 1e-6 of the largest value. On x86
    CPUs without VNNI (before 2019) ONNX Runtime's kernel saturates sums of two products at 16 bits.

    Source: ONNX Runtime, ContribOperators.md, MatMulIntegerToFloat; its "Quantize ONNX models", on U8S8.
    """

    after: ClassVar[tuple[str, ...]] = ("quantize-int8", "fold-qdq")
    targets: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")
    safety: ClassVar[Safety] = "tolerance"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        context.infer_shapes(graph)
        given_back, fresh = outputs_of_scopes(graph), fresh_names(graph)
        for scope in scopes(graph):
            editor = _Editor(scope, given_back, fresh)
            for node in list(scope.nodes):
                found = _quantized_product(node)
                if isinstance(found, str):
                    result.near_misses.append(NearMiss("FuseMatmulInteger", node.name, found, module_of(node)))
                elif found is not None and context.apply(result, "FuseMatmulInteger", node, f"'{found.weight.name}'"):
                    editor.fuse(found)
            editor.placement.finish()
        if result.rewrites:
            graph.import_domains = [d for d in graph.import_domains or [] if d.domain != MICROSOFT]
            graph.import_domains.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        return result


@dataclass(frozen=True)
class _Product:
    """MatMul or Gemm of two dequantized factors."""

    node: Node
    quantize: Node
    """The Q that makes the levels of its activation."""
    levels: Grid
    dequantize: Node
    """The DQ of its weight."""
    weights: Grid

    @property
    def transposed(self) -> bool:
        return self.node.op == "Gemm" and bool(self.node.attrs.get("transB", 0))

    @property
    def weight(self) -> Constant:
        held = self.dequantize.inputs[0]
        assert isinstance(held, Constant)
        return held

    @property
    def channels(self) -> int:
        return int(self.weight.shape[0 if self.transposed else 1])


def _quantized_product(node: Node) -> _Product | str | None:
    """What is multiplied, why the kernel cannot, or None where the factors are not both dequantized."""
    if node.op not in ("MatMul", "Gemm") or node.domain:
        return None
    factors = [producer(tensor, "DequantizeLinear") for tensor in node.inputs[:2]]
    if factors[0] is None or factors[1] is None:
        return None
    if node.outputs[0].dtype != FLOAT32:
        return f"its result is {node.outputs[0].dtype}; the kernel makes float32"
    quantize, grids = producer(factors[0].inputs[0], "QuantizeLinear"), [grid(factors[0]), grid(factors[1])]
    if not isinstance(factors[1].inputs[0], Constant) or len(factors[1].inputs[0].shape) != 2:
        return "its second factor is not one constant matrix"
    if quantize is None:
        return "nothing quantizes its first factor right before it"
    made = grid(quantize)
    if made is None or grids[0] is None or grids[1] is None or made.axis is not None or not made.same(grids[0]):
        return "its scales are computed, in blocks, or not those that its activation was quantized by"
    if any(g.zero.dtype not in (np.int8, np.uint8) for g in (made, grids[1])):
        return f"it multiplies {made.zero.dtype} with {grids[1].zero.dtype}; the kernel takes 8-bit integers"
    product = _Product(node, quantize, made, factors[1], grids[1])
    if grids[1].axis is not None and grids[1].axis != (0 if product.transposed else 1):
        return "the scales of its weight do not run along its output channels"
    if node.attrs.get("transA", 0) or any(node.attrs.get(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return "it transposes or scales a term"
    given = _given_bias(node)
    if given is not None and not _is_row(given, product.channels):
        return "its bias is not one number for each output channel"
    return product


def _given_bias(node: Node) -> Tensor | None:
    given = node.inputs[2] if node.op == "Gemm" and len(node.inputs) > 2 else None
    return None if given is None or given.is_empty() else given


def _is_row(tensor: Tensor, size: int) -> bool:
    return isinstance(tensor, Constant) and tuple(tensor.shape) == (size,)


class _Editor:
    """Writes the fused products of one scope; an activation is quantized once."""

    def __init__(self, scope: Graph, given_back: set[int], fresh: Callable[[str], str]) -> None:
        self.placement, self.given_back, self.fresh = Placement(scope, given_back), given_back, fresh
        self.unsigned: dict[int, Variable] = {}
        """id of a Q of int8 → the levels of its unsigned twin."""

    def fuse(self, product: _Product) -> None:
        """Put one node in the place of the product, and of the Add of its bias."""
        node, bias = product.node, _given_bias(product.node)
        last, zero = node, product.levels.zero
        if bias is None:
            last, bias = self._bias_after(product)
        levels: Tensor = product.quantize.outputs[0]
        if zero.dtype == np.int8:
            levels, zero = self._unsigned(product), (zero.astype(np.int16) + MIDDLE).astype(np.uint8)
        inputs = [
            levels,
            self._weight(product),
            product.quantize.inputs[1],
            product.dequantize.inputs[1],
            Constant(self.fresh(f"{levels.name}_zero_point"), zero.reshape(())),
            self._weight_zero(product),
        ]
        if bias is not None:
            inputs.append(bias)
        made = Node("MatMulIntegerToFloat", node.name, {}, inputs, list(last.outputs), domain=MICROSOFT)
        metadata(made).update(metadata(node))
        self.placement.after(last, [made])
        self.placement.remove(last)

    def _bias_after(self, product: _Product) -> tuple[Node, Constant | None]:
        """The Add of a bias that alone reads the product, and the bias; else the product, and None."""
        result = product.node.outputs[0]
        if len(result.outputs) == 1 and id(result) not in self.given_back:
            user = result.outputs[0]
            for tensor in user.inputs if user.op == "Add" and not user.domain else ():
                if isinstance(tensor, Constant) and _is_row(tensor, product.channels):
                    return user, tensor
        return product.node, None

    def _unsigned(self, product: _Product) -> Variable:
        """The levels uint8: those of int8, and 128 each."""
        quantize = product.quantize
        if id(quantize) not in self.unsigned:
            signed = quantize.outputs[0]
            levels = Variable(self.fresh(f"{signed.name}_unsigned"), np.dtype(np.uint8), signed.shape)
            values = (product.levels.zero.astype(np.int16) + MIDDLE).astype(np.uint8)
            zero = Constant(self.fresh(f"{levels.name}_zero"), values.reshape(quantize.inputs[1].shape))
            name = self.fresh(f"{levels.name}/QuantizeLinear")
            made = Node("QuantizeLinear", name, {}, [*quantize.inputs[:2], zero], [levels])
            metadata(made).update(metadata(quantize))
            self.placement.after(quantize, [made])
            self.unsigned[id(quantize)] = levels
        return self.unsigned[id(quantize)]

    def _weight(self, product: _Product) -> Constant:
        """[K, N], whichever way round the product has it."""
        held = product.weight
        if not product.transposed:
            return held
        source = held.copy()

        def values() -> Array:
            return np.ascontiguousarray(load_values(source).T)

        stored = Derived(onnx_dtype(held), tuple(held.shape[::-1]), values)
        return Constant(self.fresh(f"{held.name}_transposed"), stored)

    def _weight_zero(self, product: _Product) -> Tensor:
        """Left out where it is 0: the kernel takes it so."""
        zero = product.weights.zero
        if not zero.any():
            return Variable.empty()
        return Constant(self.fresh(f"{product.weight.name}_zero_point"), zero)
