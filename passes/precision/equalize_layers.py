"""The pass `equalize-layers`."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np

from llmc.passes.base import Context, NearMiss, PassResult, Safety, Skip
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    fresh_names,
    load_values,
    module_of,
    outputs_of_scopes,
)
from llmc.passes.precision.channel_scaling import Division
from llmc.passes.precision.selection import SelectivePass
from llmc.passes.precision.weight_sites import FLOATS, WeightSite, weight_sites

HOMOGENEOUS = ("Identity", "LeakyRelu", "PRelu", "Relu")
"""f(s · x) = s · f(x) for s > 0."""
SWEEPS = 50
EVEN = 0.01
"""Channels whose scales are all this near to 1 are left as they are."""


class EqualizeLayers(SelectivePass):
    """Evens the channels between two layers: the weights before and after each get the same range.

    f(x · W₁ + b) · W₂ → f(x · (W₁ / s) + b / s) · (s · W₂), s [channels] > 0, f none, Relu, LeakyRelu or PRelu, the
    layers both MatMul or Gemm, or both Conv (in groups and depthwise too), float32 or float16.
    s = sqrt(r₁ / r₂), with r the largest magnitude of a channel's weights, in W₁ its bias included, so that no channel
    of small weights gets a bias that outgrows the others. Pairs in a row are swept until no scale changes. Takes no
    data; stands before quantize-int8.

    **Safety:** tolerance: exact but for rounding, 1e-5 relative in float32.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019).
    """

    after: ClassVar[tuple[str, ...]] = ("fold-constants", "fuse-batch-norm")
    safety: ClassVar[Safety] = "tolerance"

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Skips a graph without weights; the near misses say why each other product has no partner."""
        context.infer_shapes(graph)
        result = PassResult()
        found = list(_layers(graph))
        if not found:
            raise Skip("no Conv, MatMul or Gemm has a constant weight")
        refusals = self.refusals([layer.node for layer in found])
        by_node = {id(layer.node): layer for layer in found}
        outputs, pairs = outputs_of_scopes(graph), []
        for layer in found:
            pair = refusals.get(id(layer.node)) or _pair(layer, by_node, outputs)
            if isinstance(pair, Pair) and id(pair.first.node) in refusals:
                pair = f"'{pair.first.node.name}' before it: {refusals[id(pair.first.node)]}"
            if isinstance(pair, Pair):
                pairs.append(pair)
            else:
                result.near_misses.append(_miss(layer.node, pair))
        fresh = fresh_names(graph)
        for pair, scale in zip(pairs, _equalize(pairs), strict=True):
            node = pair.second.node
            if np.abs(scale - 1).max() <= EVEN:
                result.near_misses.append(_miss(node, "the channels before it are even already"))
                continue
            detail = (
                f"{scale.size} channels of '{pair.first.node.name}' divided by {scale.min():.3g} to {scale.max():.3g}"
            )
            if context.apply(result, type(self).__name__, node, detail):
                for division in pair.divisions(scale):
                    division.apply(fresh)
        return result


@dataclass(frozen=True)
class Layer:
    """A product with a constant weight; axes of the weight count from 0."""

    node: Node
    position: int
    inner: int
    """The axis that is summed over."""
    outer: int
    """The axis of the output channels."""
    groups: int = 1

    @property
    def weight(self) -> Constant:
        return cast(Constant, self.node.inputs[self.position])

    @property
    def spatial(self) -> int:
        """How many axes of the result stand behind its channels."""
        return len(self.weight.shape) - 2 if self.node.op == "Conv" else 0

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[self.inner]) * self.groups

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[self.outer])

    def over_outputs(self, values: Array) -> Array:
        """[outputs], in a shape that broadcasts with the weight."""
        shape = [1] * len(self.weight.shape)
        shape[self.outer] = -1
        return values.reshape(shape)

    def over_inputs(self, values: Array) -> Array:
        """[inputs], in a shape that broadcasts with the weight, where groups stand along its output channels."""
        shape = [1] * len(self.weight.shape)
        shape[self.inner] = -1
        if self.groups == 1:
            return values.reshape(shape)
        shape[self.outer] = self.outputs
        return np.repeat(values.reshape(self.groups, -1), self.outputs // self.groups, axis=0).reshape(shape)

    def output_ranges(self, magnitudes: Array) -> Array:
        found: Array = magnitudes.max(axis=tuple(i for i in range(magnitudes.ndim) if i != self.outer), initial=0)
        return found

    def input_ranges(self, magnitudes: Array) -> Array:
        rows = np.moveaxis(magnitudes, (self.outer, self.inner), (0, 1)).reshape(
            self.outputs, self.inputs // self.groups, -1
        )
        split = rows.reshape(self.groups, self.outputs // self.groups, *rows.shape[1:])
        found: Array = split.max(axis=(1, 3), initial=0).reshape(-1)
        return found


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing but a homogeneous function between them, and what else the first one adds."""

    first: Layer
    second: Layer
    biases: list[tuple[Node, int]]

    def divisions(self, scale: Array) -> Iterator[Division]:
        """Of the constants, for `scale` [channels]."""
        scale = scale.astype(np.float32)
        yield Division(self.first.node, self.first.position, self.first.over_outputs(scale))
        for node, index in self.biases:
            flat = node.op == "Conv"
            yield Division(node, index, scale if flat else scale.reshape(-1, *[1] * self.first.spatial))
        yield Division(self.second.node, self.second.position, self.second.over_inputs(1 / scale))

    def bias_ranges(self) -> Array:
        found = np.zeros(self.first.outputs)
        for node, index in self.biases:
            values = np.abs(load_values(cast(Constant, node.inputs[index])).astype(np.float64))
            behind = 0 if node.op == "Conv" else self.first.spatial
            values = values.reshape(*[1] * (behind + 1 - values.ndim), *values.shape)
            axis = values.ndim - 1 - behind
            found = np.maximum(found, values.max(axis=tuple(i for i in range(values.ndim) if i != axis)))
        return found


def _layers(graph: Graph) -> Iterator[Layer]:
    """The layers that can be scaled by channels, in graph order."""
    sites = {id(node): site for node, site in weight_sites(graph)}
    for node in graph.nodes:
        site = sites.get(id(node))
        plain = isinstance(site, WeightSite) and site.position == 1 and len(site.weight.shape) == 2
        if plain and isinstance(site, WeightSite) and site.activation_axis == -1:
            yield Layer(node, 1, site.depth_axis, site.channel_axis)
        elif _is_conv(node):
            yield Layer(node, 1, 1, 0, int(node.attrs.get("group", 1)))


def _is_conv(node: Node) -> bool:
    if node.op != "Conv" or node.domain or not isinstance(node.inputs[1], Constant):
        return False
    return np.dtype(node.inputs[1].dtype) in FLOATS


def _pair(second: Layer, layers: dict[int, Layer], outputs: Set[int]) -> Pair | str:
    """The layer before `second`, with it, or why there is none."""
    tensor, biases = second.node.inputs[0], []
    added: list[tuple[Node, int]] = []
    while True:
        if id(tensor) in outputs:
            return f"'{tensor.name}' is an output of the graph"
        if len(tensor.outputs) != 1:
            return f"'{tensor.name}' has another consumer"
        if not tensor.inputs:
            return f"'{tensor.name}' is no node's result"
        node = tensor.inputs[0]
        first = layers.get(id(node))
        if first is not None:
            break
        if node.domain or node.op not in (*HOMOGENEOUS, "Add"):
            return f"'{tensor.name}' is made by {node.op}, which no scale goes through"
        index = 0
        if node.op == "Add":
            index = next((i for i in (0, 1) if not isinstance(node.inputs[i], Constant)), 0)
            if not isinstance(node.inputs[1 - index], Constant):
                return f"Add '{node.name}' has two terms that are not constant"
            added.append((node, 1 - index))
        tensor = node.inputs[index]
    if (first.node.op == "Conv") != (second.node.op == "Conv") or first.outputs != second.inputs:
        return f"its channels are not those of {first.node.op} '{first.node.name}'"
    if len(first.node.inputs) > 2 and not first.node.inputs[2].is_empty():
        biases.append((first.node, 2))
    for node, index in (*biases, *added):
        bias = node.inputs[index]
        behind = 0 if node.op == "Conv" else first.spatial
        if not isinstance(bias, Constant):
            return f"the bias of '{node.name}' is not constant"
        if len(bias.shape) > behind and bias.shape[-1 - behind] not in (1, first.outputs):
            return f"what '{node.name}' adds does not run along the channels"
    return Pair(first, second, [*biases, *added])


def _equalize(pairs: list[Pair]) -> list[Array]:
    """For each pair the scale [channels] that makes its ranges the same, the others' scales counted in."""
    scales = [np.ones(pair.first.outputs) for pair in pairs]
    before = {id(pair.second.node): i for i, pair in enumerate(pairs)}
    after = {id(pair.first.node): i for i, pair in enumerate(pairs)}

    def magnitudes(layer: Layer) -> Array:
        values = np.abs(load_values(layer.weight).astype(np.float64))
        if (index := before.get(id(layer.node))) is not None:
            values = values * layer.over_inputs(scales[index])
        if (index := after.get(id(layer.node))) is not None:
            values = values / layer.over_outputs(scales[index])
        return values

    for _ in range(SWEEPS):
        change = 0.0
        for i, pair in enumerate(pairs):
            r1 = np.maximum(pair.first.output_ranges(magnitudes(pair.first)), pair.bias_ranges() / scales[i])
            r2 = pair.second.input_ranges(magnitudes(pair.second))
            live = (r1 > 0) & (r2 > 0) & np.isfinite(r1) & np.isfinite(r2)
            step = np.sqrt(np.divide(r1, r2, where=live, out=np.ones_like(r1)))
            scales[i] = scales[i] * step
            change = max(change, float(np.abs(np.log(step)).max()))
        if change < 1e-3:
            break
    return scales


def _miss(node: Node, reason: str) -> NearMiss:
    return NearMiss("EqualizeLayers", node.name, reason, module_of(node))
