"""Products in formats that share a scale by the block: what `quantize-nvfp4` and `quantize-mxfp8` have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from llmc.passes.base import Context, LlmcError, PassResult, Skip
from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    Variable,
    fresh_names,
    load_values,
    metadata,
    onnx_dtype,
    rewire,
    shape_of,
)
from llmc.passes.opset import raise_opset
from llmc.passes.precision.block_formats import BlockFormat, WeightInBlocks, round_weight
from llmc.passes.precision.rounding.parts import NotFiniteError
from llmc.passes.precision.selection import SelectivePass
from llmc.passes.precision.weight_sites import WeightSite, weight_sites


class QuantizeBlocks(SelectivePass):
    """What both passes take, and do, in the format that `format` says."""

    format: ClassVar[BlockFormat]
    after: ClassVar[tuple[str, ...]] = ("fold-constants",)

    activations: bool = Field(
        True, description="Quantize activations too, each block as it comes; false: weights alone."
    )

    @abstractmethod
    def reach(self, graph: Graph, sites: list[WeightSite], context: Context) -> Mapping[str, float]:
        """The largest magnitude of each activation, where the format has to know it before it runs."""

    @abstractmethod
    def block_scales(self, insert: Inserter, site: WeightSite, amax: Variable, reach: float) -> Variable:
        """The scales of the blocks of an activation from `amax`, the largest magnitude in each."""

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError for weights or activations that are not finite, and where calibration data is missing."""
        if not any(isinstance(found, WeightSite) for _, found in weight_sites(graph)):
            raise Skip("the graph has no MatMul or Gemm with a constant weight")
        problem = raise_opset(graph, self.format.since)
        if problem is not None:
            raise LlmcError(f"{self.key()} needs opset {self.format.since}: {problem}; export it at a newer opset")
        context.infer_shapes(graph)
        result = PassResult()
        sites = self._survey(graph, result)
        reach = self.reach(graph, sites, context) if self.activations and sites else {}
        insert = Inserter(graph, self.format, context)
        for site in sites:
            self._quantize(site, insert, reach, context, result)
        insert.finish()
        if not result.rewrites:
            result.warnings.append("nothing was quantized; the report says why for each node")
        return result

    def _survey(self, graph: Graph, result: PassResult) -> list[WeightSite]:
        """What to quantize, in graph order; each other product's reason is recorded."""
        found = list(weight_sites(graph))
        refusals = self.refusals([node for node, site in found if isinstance(site, WeightSite)])
        sites = []
        for node, site in found:
            reason = refusals.get(id(node)) or (site if isinstance(site, str) else self._refusal(site))
            if reason is None and isinstance(site, WeightSite):
                sites.append(site)
            else:
                result.kept[node.name] = str(reason)
        return sites

    def _refusal(self, site: WeightSite) -> str | None:
        if site.depth % self.format.block:
            return f"its depth of {site.depth} is no multiple of the block of {self.format.block}"
        if site.position != 1 or site.activation_axis != -1 or len(site.weight.shape) != 2:
            return "its weight is not one matrix, that the last axis of the activation is multiplied with"
        if self.activations and not shape_of(site.activation):
            return f"the number of axes of '{site.activation.name}' is not known"
        return None

    def _quantize(
        self, site: WeightSite, insert: Inserter, reach: Mapping[str, float], context: Context, result: PassResult
    ) -> None:
        if reach.get(site.activation.name) == 0:
            result.kept[site.node.name] = f"its input '{site.activation.name}' is 0 throughout the calibration data"
            return
        rounded, detail = insert.rounded(site)
        if not context.apply(result, type(self).__name__, site.node, detail):
            return
        if rounded is not None:
            result.scales.count(rounded.scale)
            result.scales.clipped[site.weight.name] = rounded.clipped
        activation = self._activation(insert, site, reach) if self.activations else None
        insert.replace(site, rounded, activation)
        result.asked[site.node.name] = self.format.numpy.name + ("" if self.activations else " weights")

    def _activation(self, insert: Inserter, site: WeightSite, reach: Mapping[str, float]) -> Variable:
        """The activation of `site`, quantized and dequantized; one pair for all that multiply it."""
        tensor = site.activation
        if id(tensor) not in insert.activations:
            scales = self.block_scales(insert, site, insert.amax(site), reach.get(tensor.name, 0.0))
            insert.activations[id(tensor)] = insert.quantize(site, scales)
        return insert.activations[id(tensor)]


class Inserter:
    """Puts nodes before the products that use them; weights and activations once each."""

    def __init__(self, graph: Graph, form: BlockFormat, context: Context) -> None:
        self.graph, self.format, self.context = graph, form, context
        self.fresh = fresh_names(graph)
        self.weights: dict[tuple[int, int], Variable] = {}
        """(id of a weight, its depth axis) → what DequantizeLinear gives."""
        self.activations: dict[int, Variable] = {}
        """id of an activation → the same."""
        self.replaced: list[Constant] = []
        """Weights that may have no reader any more: they are held on to, as another would get their id."""
        self.before: dict[int, list[Node]] = {}
        """id of a node → nodes that must stand before it."""

    def rounded(self, site: WeightSite) -> tuple[WeightInBlocks | None, str]:
        """The weight in the format, None where it has been made before; and what the report says of it."""
        weight = site.weight
        if (id(weight), site.depth_axis) in self.weights:
            return None, f"'{weight.name}' as before"
        try:
            rounded = round_weight(load_values(weight), site.depth_axis, self.format)
        except NotFiniteError as error:
            place = f"'{weight.name}' of {site.node.name}"
            raise LlmcError(f"weight {place} has NaN or infinity: it cannot be quantized") from error
        return rounded, f"'{weight.name}' moved by {rounded.moved:.2%}"

    def replace(self, site: WeightSite, rounded: WeightInBlocks | None, activation: Variable | None) -> None:
        """Let the site's node multiply what is dequantized."""
        if rounded is not None:
            self.weights[id(site.weight), site.depth_axis] = self._weight(site, rounded)
        self.replaced.append(site.weight)
        weight, edges = self.weights[id(site.weight), site.depth_axis], []
        if activation is not None:
            edges.append((site.node, 1 - site.position, activation))
        rewire([*edges, (site.node, site.position, weight)])

    def _weight(self, site: WeightSite, rounded: WeightInBlocks) -> Variable:
        weight, name = site.weight, f"{site.weight.name}_{self.format.name}"
        scales = self.context.keep(self.format.scale_dtype, rounded.stored)
        scale: Tensor = Constant(self.fresh(f"{name}_scale"), scales)
        if self.format.two_levels:
            scale = self.scale_of(scale, rounded.whole, site, name)
        stored = Constant(self.fresh(name), self.context.keep(self.format.dtype, rounded.elements))
        return self.dequantize(stored, scale, site, f"{name}_dequantized", weight.shape, site.depth_axis)

    def amax(self, site: WeightSite) -> Variable:
        """The largest magnitude in each block of the activation: [..., depth] → [..., blocks]."""
        tensor, name = site.activation, f"{site.activation.name}_{self.format.name}"
        shape, dtype = shape_of(tensor) or (), np.dtype(site.weight.dtype)
        target = np.array([*[0] * (len(shape) - 1), -1, self.format.block], np.int64)
        count = site.depth // self.format.block
        blocks = Variable(self.fresh(f"{name}_blocks"), dtype, [*shape[:-1], count, self.format.block])
        self.add("Reshape", site.node, [tensor, Constant(self.fresh(f"{name}_shape"), target)], blocks)
        magnitudes = Variable(self.fresh(f"{name}_magnitudes"), dtype, blocks.shape)
        self.add("Abs", site.node, [blocks], magnitudes)
        made = Variable(self.fresh(f"{name}_amax"), dtype, [*shape[:-1], count])
        axes = Constant(self.fresh(f"{name}_axes"), np.array([-1], np.int64))
        return self.add("ReduceMax", site.node, [magnitudes, axes], made, keepdims=0)

    def quantize(self, site: WeightSite, scale: Variable) -> Variable:
        """The activation in blocks of the format, and back."""
        tensor, name = site.activation, f"{site.activation.name}_{self.format.name}"
        made = Variable(self.fresh(name), self.format.numpy, tensor.shape)
        attributes = {"axis": -1, "block_size": self.format.block, "output_dtype": self.format.dtype}
        self.add("QuantizeLinear", site.node, [tensor, scale], made, **attributes)
        return self.dequantize(made, scale, site, f"{name}_dequantized", tensor.shape, -1)

    def scale_of(self, stored: Tensor, whole: float, site: WeightSite, name: str) -> Variable:
        """Block scales in E4M3 → in the type that the site computes in."""
        dtype = np.dtype(site.weight.dtype)
        made = Variable(self.fresh(f"{name}_scales"), dtype, stored.shape)
        return self.add("DequantizeLinear", site.node, [stored, self.scalar(f"{name}_tensor_scale", whole, site)], made)

    def dequantize(
        self,
        stored: Tensor,
        scale: Tensor,
        site: WeightSite,
        name: str,
        shape: Sequence[int | str | None] | None,
        axis: int,
    ) -> Variable:
        """Blocks along `axis` → numbers of the type that the site computes in."""
        made = Variable(self.fresh(name), np.dtype(site.weight.dtype), shape)
        attributes: dict[str, object] = {"axis": axis, "block_size": self.format.block}
        if not self.format.two_levels:
            attributes["output_dtype"] = onnx_dtype(made)
        return self.add("DequantizeLinear", site.node, [stored, scale], made, **attributes)

    def scalar(self, name: str, value: float, site: WeightSite) -> Constant:
        return Constant(self.fresh(name), np.asarray(value, np.dtype(site.weight.dtype)))

    def add(self, op: str, user: Node, inputs: list[Tensor], output: Variable, **attributes: object) -> Variable:
        """A node that makes `output`, to stand before `user`."""
        node = Node(op, self.fresh(f"{output.name}/{op}"), attributes, inputs, [output])
        metadata(node).update(metadata(user))
        self.before.setdefault(id(user), []).append(node)
        return output

    def finish(self) -> None:
        """Bring the nodes in order."""
        self.graph.nodes = [new for node in self.graph.nodes for new in (*self.before.get(id(node), ()), node)]
