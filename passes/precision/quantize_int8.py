"""INT8 arithmetic, by QuantizeLinear and DequantizeLinear nodes around the tensors that it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast, get_args

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict, Field

from llmc.passes.base import Context, LlmcError, Need, PassResult, Safety, Skip
from llmc.passes.graph import (
    Array,
    Constant,
    Derived,
    Graph,
    Node,
    Tensor,
    Variable,
    constant_value,
    fresh_names,
    infer_shapes,
    load_values,
    metadata,
    numpy_dtype,
    outputs_of_scopes,
    scopes,
    unlink,
)
from llmc.passes.opset import raise_opset
from llmc.passes.precision.selection import SelectivePass

LEVELS = 127
"""Symmetric INT8 is -127 … 127."""
SINCE = {np.dtype(np.float32): 13, np.dtype(np.float16): 19}
"""Type that can be quantized → the opset from which QuantizeLinear takes it, with an axis."""
FINE = 2.0**-17
"""From here up, float16 is no coarser than 2**-7 of the value."""
Operator = Literal["MatMul", "Gemm", "Conv", "ConvTranspose"]
PRODUCTS: frozenset[str] = frozenset(get_args(Operator))
OTHERS = frozenset({"Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN"})
"""Operators that multiply too; the report says that they stay as they are."""


class Calibration(BaseModel):
    """Where the scales of activations come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    data: Path | None = Field(None, description="Folder of .npz files, or text file with one sample a line.")
    samples: int = Field(128, gt=0, description="Samples to use, from the first; all where there are fewer.")
    method: Literal["minmax", "percentile", "entropy", "mse"] = Field(
        "mse", description="How to choose where activations clip."
    )
    percentile: float = Field(99.99, gt=0, le=100, description="Percent of values left unclipped by 'percentile'.")


class QuantizeInt8(SelectivePass):
    """Multiply in INT8: static, symmetric, per-channel weights, per-tensor activations.

    MatMul, Gemm, Conv, ConvTranspose (x: float, W: constant) → the same with
    x: QuantizeLinear(x, s, 0) int8 → DequantizeLinear, s [] = amax(x) / 127 from calibration data, and
    W: int8 constant → DequantizeLinear(W, s, 0, axis), s [channels] = amax(W, channel) / 127.
    Zero points are int8 zeros. Scales have the type of the tensor that they quantize, float32 or float16, and are
    rounded up to float16 values, so that a later convert-fp16 moves no grid. One Q/DQ pair serves all consumers of
    an activation; biases stay as they are. A weight behind Transpose, Reshape or Cast is quantized as its consumer
    sees it, with one int8 copy for each channel axis that it is used with.

    **Safety:** lossy. Rounding moves each value by at most half a scale; beyond the calibrated range it clips.

    Source: ONNX operator specification, QuantizeLinear and DequantizeLinear; Jacob et al., "Quantization and
    Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018); Wu et al., "Integer
    Quantization for Deep Learning Inference" (2020); TensorRT developer guide, "Working with Quantized Types".
    """

    after: ClassVar[tuple[str, ...]] = ("fold-constants",)
    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    safety: ClassVar[Safety] = "lossy"

    operators: list[Operator] = Field(
        ["MatMul", "Gemm", "Conv"],
        description="Operators to quantize. In TensorRT-RTX, ConvTranspose saves space only.",
    )
    attention: bool = Field(False, description="Quantize products of two activations too (Q·Kᵀ and weights·V).")
    calibration: Calibration = Field(Calibration(), description="Where the scales of activations come from.")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError for a pattern that matches nothing, and for weights or activations that are not finite."""
        if self.attention:
            infer_shapes(graph)
        products, result = self._survey(graph)
        needed = max((SINCE[product.dtype] for product in products), default=0)
        if graph.opset < needed:
            problem = raise_opset(graph, needed)
            if problem is not None:
                raise LlmcError(f"quantize-int8 needs opset {needed}: {problem}; export the model at a newer opset")
            products, result = self._survey(graph)
        if not products and not result.kept:
            raise Skip(f"the graph has no {', '.join(sorted(PRODUCTS))}")
        amax = self._calibrate(graph, products, context)
        editor = _Editor(graph)
        for product in products:
            silent = next((name for name in product.names if amax[name] == 0), None)
            if silent is not None:
                result.kept[product.node.name] = f"its input '{silent}' is 0 throughout the calibration data"
            elif context.apply(result, "QuantizeInt8", product.node, product.describe(amax)):
                editor.quantize(product, amax)
                result.asked[product.node.name] = "int8"
        editor.finish()
        if all(product.node.name in result.kept for product in products):
            result.warnings.append("nothing was quantized; the report says why for each node")
        return result

    def _survey(self, graph: Graph) -> tuple[list[_Product], PassResult]:
        """What to quantize, in graph order, and a result that holds why each other product is left alone."""
        result = PassResult()
        refusals = self.refusals([node for node in graph.nodes if _is(node, PRODUCTS)])
        products = []
        for node in graph.nodes:
            if _is(node, PRODUCTS | OTHERS):
                found = self._refusal(node) or refusals.get(id(node)) or _product(node, self.attention)
                if isinstance(found, str):
                    result.kept[node.name] = found
                else:
                    products.append(found)
        for scope in scopes(graph)[1:]:
            for node in scope.nodes:
                if _is(node, PRODUCTS | OTHERS):
                    result.kept[node.name] = "inside a subgraph: its tensors cannot be calibrated"
        return products, result

    def _refusal(self, node: Node) -> str | None:
        if node.op in OTHERS:
            return f"this pass does not quantize {node.op}"
        if node.op not in self.operators:
            return f"{node.op} is not among the operators to quantize"
        return None

    def _calibrate(self, graph: Graph, products: list[_Product], context: Context) -> Mapping[str, float]:
        if not products:
            return {}
        if context.activations is None:
            raise LlmcError("quantize-int8 needs calibration data: give some with --calibration DATA")
        return context.activations.amax(
            graph,
            list(dict.fromkeys(name for product in products for name in product.names)),
            method=self.calibration.method,
            percentile=self.calibration.percentile,
            samples=self.calibration.samples,
        )


# What to quantize


Reader = Callable[[], Array]
"""Reads a constant's values, when they are needed."""


@dataclass(frozen=True)
class _Product:
    """A node to quantize: its activations, and its weight, if it has one, with the axis of its output channels."""

    node: Node
    dtype: np.dtype[np.floating]
    activations: tuple[Tensor, ...]
    weight: Tensor | None = None
    read: Reader | None = None
    axis: int = 0

    @property
    def names(self) -> list[str]:
        """Of the activations, each once."""
        return list(dict.fromkeys(tensor.name for tensor in self.activations))

    def describe(self, amax: Mapping[str, float]) -> str:
        clips = ", ".join(f"'{name}' clips at {amax[name]:.4g}" for name in self.names)
        return clips if self.weight is None else f"{clips}; '{self.weight.name}' per channel on axis {self.axis}"


def _product(node: Node, attention: bool) -> _Product | str:
    """How `node` is quantized, or why not."""
    factors = node.inputs[:2]
    if any(_producer(tensor, {"DequantizeLinear"}) for tensor in factors):
        return "quantized already"
    readers = [_reader(tensor) for tensor in factors]
    if all(readers):
        return "both its factors are constant: fold-constants makes it one"
    position = next((i for i, read in enumerate(readers) if read is not None), None)
    if position is None:
        return _activation_product(node, attention)
    if position == 0 and node.op.startswith("Conv"):
        return "its weight is not constant"
    read = cast("Reader", readers[position])
    weight = read()
    if weight.dtype not in SINCE:
        return f"its weight is {weight.dtype}; INT8 takes the place of float32 and float16"
    if weight.ndim < 2:
        return "its weight is a vector: INT8 gains nothing"
    axis = _channel_axis(node, position, weight.ndim)
    return _Product(node, weight.dtype, (factors[1 - position],), factors[position], read, axis)


def _activation_product(node: Node, attention: bool) -> _Product | str:
    if node.op.startswith("Conv"):
        return "its weight is not constant"
    if not attention:
        return "it multiplies two activations ('attention: true' quantizes those)"
    first, second = node.inputs[:2]
    dtype = first.dtype or second.dtype
    if dtype not in SINCE:
        return f"its factors are {dtype or 'of unknown type'}; INT8 takes the place of float32 and float16"
    return _Product(node, dtype, (first, second))


def _channel_axis(node: Node, position: int, rank: int) -> int:
    """The axis of the weight, at input `position`, along which output channels run (in a group, for ConvTranspose)."""
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1
    transposed = bool(node.attrs.get("transB" if position else "transA", 0))
    return rank - 1 if (position == 1) != transposed else rank - 2


def _reader(tensor: Tensor) -> Reader | None:
    """Reads a constant, or what Transpose, Reshape, Cast and Identity make of one; None for any other tensor.

    It reads what stands there now, whatever later passes do to the tensors on the way.
    """
    if isinstance(tensor, Constant):
        held = tensor.copy()
        return lambda: load_values(held)
    node = _producer(tensor, {"Transpose", "Reshape", "Cast", "Identity"})
    inner = _reader(node.inputs[0]) if node is not None else None
    if node is None or inner is None:
        return None
    if node.op == "Transpose":
        order = node.attrs.get("perm")
        return lambda: inner().transpose(order)
    if node.op == "Cast":
        dtype = numpy_dtype(node.attrs["to"])
        return lambda: inner().astype(dtype)
    if node.op == "Identity":
        return inner
    wanted = constant_value(node.inputs[1])
    if wanted is None:
        return None
    old, zero_is_old = inner().shape, not node.attrs.get("allowzero", 0)
    shape = [old[i] if size == 0 and zero_is_old else int(size) for i, size in enumerate(wanted)]
    return lambda: inner().reshape(shape)


def _producer(tensor: Tensor, ops: Collection[str]) -> Node | None:
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and _is(node, ops) else None


def _is(node: Node, ops: Collection[str]) -> bool:
    return node.op in ops and node.domain in (None, "", "ai.onnx")


# Numbers


def scales(amax: Array, dtype: np.dtype[np.floating]) -> Array:
    """`amax` / 127 in `dtype`, above 0 always; 1 where `amax` is 0. Rounded up to float16, unless that is too coarse.

    Rounded before anything is quantized with it, it costs some resolution (2**-10, as a rule), and no value moves
    when the graph goes to float16.
    """
    exact = np.maximum(np.where(amax > 0, amax, LEVELS) / np.float64(LEVELS), np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    half = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
    if dtype == np.float16:
        return half
    return np.where((exact >= FINE) & np.isfinite(half), half, exact).astype(dtype)


def quantize(weight: Array, scale: Array) -> Array:
    """round(weight / scale) as int8; `scale` broadcasts. Ties round to even, as QuantizeLinear does."""
    return np.clip(np.rint(weight / scale.astype(np.float32)), -LEVELS, LEVELS).astype(np.int8)


# Changing the graph


class _Editor:
    """Puts Q/DQ pairs before the nodes that use them, each pair once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.fresh = fresh_names(graph)
        self.made: dict[tuple[int, int | None], Variable] = {}
        """(id of the tensor, channel axis; None for an activation) → what DequantizeLinear gives."""
        self.before: dict[int, list[Node]] = {}
        """id of a node → nodes that must stand before it."""
        self.replaced: list[Tensor] = []

    def quantize(self, product: _Product, amax: Mapping[str, float]) -> None:
        node = product.node
        for position, tensor in enumerate(list(node.inputs[:2])):
            if tensor is product.weight:
                node.inputs[position] = self._weight(product)
                self.replaced.append(tensor)
            else:
                node.inputs[position] = self._activation(product, tensor, amax[tensor.name])

    def _activation(self, product: _Product, tensor: Tensor, amax: float) -> Variable:
        if (id(tensor), None) not in self.made:
            parameters = self._parameters(tensor.name, scales(np.asarray(amax), product.dtype))
            quantized = Variable(self.fresh(f"{tensor.name}_int8"), np.dtype(np.int8), tensor.shape)
            self._node("QuantizeLinear", product.node, [tensor, *parameters], quantized)
            self._dequantize(product, tensor, [quantized, *parameters])
        return self.made[id(tensor), None]

    def _weight(self, product: _Product) -> Variable:
        weight, axis = cast("Tensor", product.weight), product.axis
        if (id(weight), axis) not in self.made:
            read = cast("Reader", product.read)
            values = read()
            others = tuple(i for i in range(values.ndim) if i != axis)
            amax = np.abs(values).max(axis=others, initial=0)
            if not np.isfinite(amax).all():
                raise LlmcError(f"quantize-int8: weight '{weight.name}' of {product.node.name} has NaN or infinity")
            scale = scales(amax, product.dtype)
            spread = np.expand_dims(scale, others)
            stored = Derived(onnx.TensorProto.INT8, values.shape, lambda: quantize(read(), spread))
            constant = Constant(self.fresh(f"{weight.name}_int8"), stored)
            self._dequantize(product, weight, [constant, *self._parameters(weight.name, scale)], axis=axis)
        return self.made[id(weight), axis]

    def _parameters(self, name: str, scale: Array) -> list[Constant]:
        """Scale, and zero points of its shape."""
        zeros = np.zeros(scale.shape, np.int8)
        return [Constant(self.fresh(f"{name}_scale"), scale), Constant(self.fresh(f"{name}_zero_point"), zeros)]

    def _dequantize(self, product: _Product, tensor: Tensor, inputs: list[Tensor], **axis: int) -> None:
        made = Variable(self.fresh(f"{tensor.name}_dequantized"), product.dtype, inputs[0].shape)
        self._node("DequantizeLinear", product.node, inputs, made, **axis)
        self.made[id(tensor), axis.get("axis")] = made

    def _node(self, op: str, user: Node, inputs: list[Tensor], output: Variable, **attributes: int) -> None:
        node = Node(op, self.fresh(f"{output.name}/{op}"), attributes, inputs, [output])
        metadata(node).update(metadata(user))
        self.before.setdefault(id(user), []).append(node)

    def finish(self) -> None:
        """Bring the nodes in order, and drop those that made weights that nothing uses now."""
        nodes = [new for node in self.graph.nodes for new in (*self.before.get(id(node), ()), node)]
        outputs = outputs_of_scopes(self.graph)
        dropped = {id(node) for tensor in self.replaced for node in _unused(tensor, outputs)}
        self.graph.nodes = [node for node in nodes if id(node) not in dropped]


def _unused(tensor: Tensor, outputs: set[int]) -> Iterator[Node]:
    """The nodes that made `tensor`, and are of no use without it; their edges are taken away."""
    if tensor.outputs or id(tensor) in outputs:
        return
    for node in list(tensor.inputs):
        sources = list(node.inputs)
        unlink(node)
        yield node
        for source in sources:
            yield from _unused(source, outputs)
