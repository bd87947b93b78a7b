"""Puts QuantizeLinear and DequantizeLinear before the products that are to be quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np

from llmc.passes.base import LlmcError, Scales
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Rowwise,
    Tensor,
    Variable,
    fresh_names,
    metadata,
    outputs_of_scopes,
    unlink,
)
from llmc.passes.graph.in_parts import on_every_core, row_slices
from llmc.passes.precision.levels import Levels
from llmc.passes.precision.products import WHOLE, Product, Reader


def channel_scales(product: Product, levels: Levels) -> Array:
    """A scale for each output channel of a product's weight. Raises LlmcError for a weight that is not finite."""
    read = cast("Reader", product.read)
    shape = _shape(product)
    others = tuple(i for i in range(len(shape)) if i != product.axis)

    def reach(rows: slice) -> Array:
        found: Array = np.abs(read(rows)).max(axis=others, initial=0)
        return found

    parts = on_every_core(reach, row_slices(shape))
    amax = np.concatenate(parts) if product.axis == 0 else np.maximum.reduce(parts)
    if not np.isfinite(amax).all():
        weight = cast("Tensor", product.weight)
        raise LlmcError(f"weight '{weight.name}' of {product.node.name} has NaN or infinity: it cannot be quantized")
    return levels.scales(amax, product.dtype)


def _shape(product: Product) -> tuple[int, ...]:
    """Of the weight."""
    weight = cast("Tensor", product.weight)
    known = weight.shape if weight.shape is not None else cast("Reader", product.read)(WHOLE).shape
    return tuple(map(int, known))


class Inserter:
    """Puts Q/DQ pairs before the nodes that use them, each pair once."""

    def __init__(self, graph: Graph, levels: Levels) -> None:
        self.graph, self.levels = graph, levels
        self.fresh = fresh_names(graph)
        self.made: dict[tuple[int, int | None], Variable] = {}
        """(id of the tensor, channel axis; None for an activation) → what DequantizeLinear gives."""
        self.readers: dict[int, Node] = {}
        """id of a quantized activation → the node that its pair stands before."""
        self.before: dict[int, list[Node]] = {}
        """id of a node → nodes that must stand before it."""
        self.replaced: list[Tensor] = []
        self.scales = Scales()

    def quantize(self, product: Product, amax: Mapping[str, float]) -> None:
        node = product.node
        for position, tensor in enumerate(list(node.inputs[:2])):
            if tensor is product.weight:
                node.inputs[position] = self._weight(product)
                self.replaced.append(tensor)
            else:
                node.inputs[position] = self._activation(product, tensor, amax[tensor.name])

    def reuse(self, node: Node, position: int) -> None:
        """Let `node`, which stands after the pair of one of its inputs, read what that pair gives."""
        node.inputs[position] = self.made[id(node.inputs[position]), None]

    def _activation(self, product: Product, tensor: Tensor, amax: float) -> Variable:
        if (id(tensor), None) not in self.made:
            scale = self.levels.scales(np.asarray(amax), product.dtype)
            self.scales.activations[tensor.name] = float(scale)
            parameters = self._parameters(tensor.name, scale)
            quantized = Variable(self.fresh(f"{tensor.name}_{self.levels.name}"), self.levels.numpy, tensor.shape)
            self._node("QuantizeLinear", product.node, [tensor, *parameters], quantized)
            self._dequantize(product, tensor, [quantized, *parameters])
            self.readers[id(tensor)] = product.node
        return self.made[id(tensor), None]

    def _weight(self, product: Product) -> Variable:
        weight, axis = cast("Tensor", product.weight), product.axis
        if (id(weight), axis) not in self.made:
            read, scale = cast("Reader", product.read), channel_scales(product, self.levels)
            self.scales.count(scale)
            shape = _shape(product)
            spread = np.broadcast_to(np.expand_dims(scale, [i for i in range(len(shape)) if i != axis]), shape)
            stored = Rowwise(self.levels.dtype, shape, lambda rows: self.levels.quantize(read(rows), spread[rows]))
            constant = Constant(self.fresh(f"{weight.name}_{self.levels.name}"), stored)
            self._dequantize(product, weight, [constant, *self._parameters(weight.name, scale)], axis=axis)
        return self.made[id(weight), axis]

    def _parameters(self, name: str, scale: Array) -> list[Constant]:
        """Scale, and zero points of its shape."""
        zeros = np.zeros(scale.shape, self.levels.numpy)
        return [Constant(self.fresh(f"{name}_scale"), scale), Constant(self.fresh(f"{name}_zero_point"), zeros)]

    def _dequantize(self, product: Product, tensor: Tensor, inputs: list[Tensor], **axis: int) -> None:
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
