"""The pass `quantize-weights`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import Field

from llmc.passes.base import Context, LlmcError, NearMiss, Need, PassResult, Safety, Skip
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Tensor,
    Variable,
    copy_graph,
    fresh_names,
    load_values,
    metadata,
    module_of,
    numpy_dtype,
    onnx_dtype,
    outputs_of_scopes,
    rewire,
)
from llmc.passes.opset import raise_opset
from llmc.passes.precision.calibration import Calibration
from llmc.passes.precision.channel_scaling import Refusal, divide, quotient
from llmc.passes.precision.rounding import awq
from llmc.passes.precision.rounding.gptq import Debts, gptq
from llmc.passes.precision.rounding.grid import TYPES, Levels, Rounded, cover, nearest
from llmc.passes.precision.rounding.hqq import fitted
from llmc.passes.precision.rounding.moments import Moments, Source, batches, gather
from llmc.passes.precision.rounding.parts import Levelled, NotFiniteError, round_in_parts, round_rows
from llmc.passes.precision.selection import SelectivePass
from llmc.passes.precision.weight_sites import WeightSite, weight_sites

BLOCKS_SINCE = 21
"""The opset from which DequantizeLinear takes 4-bit levels and blocks."""
CALIBRATED = ("gptq", "awq")
MIB = 1 << 20


class QuantizeWeights(SelectivePass):
    """Stores weights as INT4 or INT8 in blocks with a scale each; products are computed as before.

    MatMul or Gemm (x: float, W: constant [K, N]) → the same with W: int4 constant [K, N] → DequantizeLinear(W, s,
    axis=0, block_size), s [K / block, N]; int4[N, K] and s [N, K / block] behind Gemm's transB. One scale for each
    output channel where `block` is 'channel': s [N]. Asymmetric weights are uint4 or uint8 with zero points of the
    shape of s. Scales have the type of the weight, and are rounded up to float16 values before anything is rounded
    by them. The opset is raised to 21.

    How values become levels (`method`): `rtn`, each to the nearest; `hqq`, to the nearest on scales fitted to the
    weight; `gptq`, one after another, each error made up for by the values that are left; `awq`, to the nearest,
    channels that meet large activations made larger first and their activations smaller, by dividing the constants of
    the normalisation or product before, which is exact, and ranges clipped where that moves outputs least. gptq and
    awq look at activations on calibration data, as many layers at a time as fit in `memory`; with `sequential` each
    layer sees what the rounded ones before it give.

    **Safety:** lossy. rtn moves each value by at most half its scale: 1/14 of its block's largest for INT4.

    Source: ONNX operator specification, DequantizeLinear-21; Frantar et al., "GPTQ" (2023); Lin et al., "AWQ" (2024);
    Badri and Shaji, "Half-Quadratic Quantization" (2023).
    """

    after: ClassVar[tuple[str, ...]] = ("fold-constants",)
    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    safety: ClassVar[Safety] = "lossy"

    bits: Literal[4, 8] = Field(4, description="Bits of a weight.")
    block: Literal[16, 32, 64, 128, "channel"] = Field(
        32, description="Values along the summed axis with one scale; 'channel': all of an output channel."
    )
    symmetric: bool = Field(True, description="No zero points: TensorRT takes no others. False fits skewed weights.")
    method: Literal["rtn", "hqq", "gptq", "awq"] = Field("gptq", description="How values become levels.")
    insert_mul: bool = Field(
        False, description="awq: a Mul before products whose activations cannot be scaled for nothing."
    )
    sequential: bool = Field(False, description="gptq, awq: later layers see earlier ones rounded; a run for each.")
    memory: int = Field(1024, gt=0, description="gptq, awq: MiB for the statistics of activations.")
    calibration: Calibration = Field(Calibration(), description="gptq, awq: where activations come from.")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError for weights or activations that are not finite, and where there is no calibration data."""
        if not any(isinstance(found, WeightSite) for _, found in weight_sites(graph)):
            raise Skip("the graph has no MatMul or Gemm with a constant weight")
        problem = raise_opset(graph, BLOCKS_SINCE)
        if problem is not None:
            raise LlmcError(
                f"quantize-weights needs opset {BLOCKS_SINCE}: {problem}; export the model at a newer opset"
            )
        context.infer_shapes(graph)
        return _Run(self, graph, context).result()

    def levels(self, depth: int) -> Levels | str:
        """The integers for rows of `depth` values, or why there are none."""
        block = depth if self.block == "channel" else self.block
        if depth % block:
            return f"its depth of {depth} is no multiple of the block of {block}"
        return Levels(self.bits, block, self.symmetric)


@dataclass
class _Group:
    """Weights that multiply the same activation along the same axis."""

    source: Source
    levels: Levels
    sites: list[WeightSite] = field(default_factory=list)


class _Run:
    """One run of the pass over one graph."""

    def __init__(self, step: QuantizeWeights, graph: Graph, context: Context) -> None:
        self.step, self.graph, self.context = step, graph, context
        self.done = PassResult()
        self.fresh = fresh_names(graph)
        self.outputs = outputs_of_scopes(graph)
        self.homes: dict[tuple[int, int], Node] = {}
        """(id of a weight, its depth axis) → the first node in graph order that reads it so."""
        self.made: dict[tuple[int, int], Variable] = {}
        """The same → what DequantizeLinear gives."""
        self.replaced: list[Constant] = []
        """Weights that may have no reader any more: they are held on to, as another would get their id."""
        self.before: dict[int, list[Node]] = {}
        """id of a node → nodes that must stand before it."""

    def result(self) -> PassResult:
        groups = self._survey()
        if self.step.method in CALIBRATED:
            for batch, moments in self._calibrated(groups):
                for group in batch:
                    self._round(group, moments[group.source])
                self._place()
        else:
            for group in groups:
                self._round(group, None)
        self._place()
        if not groups:
            self.done.warnings.append("no weight was quantized; the report says why for each node")
        return self.done

    def _survey(self) -> list[_Group]:
        """What to quantize, in graph order; each other product's reason is recorded."""
        groups: dict[tuple[int, int, int], _Group] = {}
        found = list(weight_sites(self.graph))
        refusals = self.step.refusals([node for node, site in found if isinstance(site, WeightSite)])
        for node, site in found:
            site = refusals.get(id(node), site)
            levels = site if isinstance(site, str) else self.step.levels(site.depth)
            if isinstance(site, str) or isinstance(levels, str):
                self.done.kept[node.name] = str(levels)
                continue
            source = Source(site.activation.name, site.activation_axis, site.depth)
            key = (id(site.activation), source.axis, source.depth)
            groups.setdefault(key, _Group(source, levels)).sites.append(site)
            self.homes.setdefault((id(site.weight), site.depth_axis), node)
        return list(groups.values())

    # Activations

    def _calibrated(self, groups: list[_Group]) -> Iterator[tuple[list[_Group], Mapping[Source, Moments]]]:
        """Groups with what calibration tells of their activations, as many at a time as memory allows."""
        if self.context.activations is None:
            raise LlmcError(f"quantize-weights by {self.step.method} needs calibration data: give --calibration DATA")
        graph = self.graph if self.step.sequential else copy_graph(self.graph)
        by_source = {group.source: group for group in groups}
        for stage in self._stages(groups):
            for batch in batches([group.source for group in stage], self.step.memory * MIB):
                yield (
                    [by_source[source] for source in batch],
                    gather(self.context.activations, graph, batch, self.step.calibration.samples),
                )

    def _stages(self, groups: list[_Group]) -> list[list[_Group]]:
        """All at once; where sequential, one after another those between which no product to quantize stands."""
        if not self.step.sequential:
            return [groups]
        rounded = {id(site.node) for group in groups for site in group.sites}
        depth: dict[int, int] = {}
        for node in self.graph.nodes:
            reached = max((depth.get(id(tensor), 0) for tensor in node.inputs), default=0) + (id(node) in rounded)
            depth.update((id(tensor), reached) for tensor in node.outputs)
        stages: dict[int, list[_Group]] = {}
        for group in groups:
            stages.setdefault(depth.get(id(group.sites[0].activation), 0), []).append(group)
        return [stages[reached] for reached in sorted(stages)]

    # Rounding

    def _round(self, group: _Group, moments: Moments | None) -> None:
        if self.step.method == "awq" and moments is not None:
            moments = self._scale_channels(group, moments)
        for site in group.sites:
            key = (id(site.weight), site.depth_axis)
            try:
                found = None if key in self.made else self._rounded(site, group.levels, moments)
            except NotFiniteError as error:
                place = f"'{site.weight.name}' of {site.node.name}"
                raise LlmcError(f"quantize-weights: weight {place} has NaN or infinity") from error
            detail = f"'{site.weight.name}' " + ("as before" if found is None else self._told(found))
            if not self.context.apply(self.done, "QuantizeWeights", site.node, detail):
                continue
            if found is not None:
                self.made[key] = self._dequantize(site, found, self.homes.get(key, site.node))
                self.done.scales.count(found.scale)
                self.done.scales.clipped[site.weight.name] = found.clipped
            self._read(site, self.made[key])
            self.done.asked[site.node.name] = f"int{self.step.bits} weights"

    def _rounded(self, site: WeightSite, levels: Levels, moments: Moments | None) -> Levelled:
        if moments is None:
            fit = cover if self.step.method == "rtn" else fitted
            return round_in_parts(load_values(site.weight), site.depth_axis, levels, fit)
        hessian = moments.hessian
        debts = Debts.of(hessian) if self.step.method == "gptq" else None

        def rounding(rows: Array) -> Rounded:
            if debts is not None:
                return gptq(rows, awq.clip(rows, levels, hessian), debts)
            return nearest(rows, levels, awq.clip_together(rows, levels, hessian))

        return round_rows(load_values(site.weight), site.depth_axis, levels, rounding, hessian)

    def _told(self, found: Levelled) -> str:
        """What the report says of it."""
        moved = "moves its output" if self.step.method in CALIBRATED else "moved"
        return f"by {self.step.method}: {moved} by {found.error:.2%}"

    # AWQ's scales

    def _scale_channels(self, group: _Group, moments: Moments) -> Moments:
        """Weights times, activations divided by the same numbers, where that can be done; the moments after it."""
        if group.source.axis != -1:
            return moments
        matrices = [site.matrix() for site in group.sites]
        scales = awq.channel_scales(matrices, group.levels, moments)
        if (scales == 1).all():
            return moments
        first, nodes = group.sites[0], [site.node for site in group.sites]
        divisions = divide(first.activation, scales, nodes, self.outputs)
        if isinstance(divisions, Refusal) and not self.step.insert_mul:
            reason = f"AWQ would scale {group.source.tensor}'s channels: {divisions}; 'insert_mul' would do it"
            self.done.near_misses.append(NearMiss("ScaleChannels", first.node.name, reason, module_of(first.node)))
            return moments
        detail = f"channels of '{group.source.tensor}' divided by {scales.min():.3g} to {scales.max():.3g}"
        if not self.context.apply(self.done, "ScaleChannels", first.node, detail):
            return moments
        if isinstance(divisions, Refusal):
            self._insert_mul(group, scales)
        else:
            for division in divisions:
                division.apply(self.fresh)
        for site in group.sites:
            inverse = _spread(site, 1 / scales)
            self._read(site, quotient(site.weight, inverse, self.fresh))
        return moments.divided(scales)

    def _insert_mul(self, group: _Group, scales: Array) -> None:
        first, old = group.sites[0], group.sites[0].activation
        factor = Constant(self.fresh(f"{old.name}_channels"), (1 / scales).astype(old.dtype))
        scaled = Variable(self.fresh(f"{old.name}_scaled"), old.dtype, old.shape)
        self._add("Mul", first.node, first.node, [old, factor], scaled)
        rewire([(site.node, 1 - site.position, scaled) for site in group.sites])

    # Changing the graph

    def _read(self, site: WeightSite, weight: Tensor) -> None:
        """Let the site's node read `weight` in the place of its own."""
        self.replaced.append(site.weight)
        rewire([(site.node, site.position, weight)])

    def _dequantize(self, site: WeightSite, found: Levelled, home: Node) -> Variable:
        weight, kind = site.weight, TYPES[self.step.bits, self.step.symmetric]
        blocked = self.step.block != "channel"
        inputs: list[Tensor] = [
            self._stored(f"{weight.name}_{numpy_dtype(kind).name}", kind, found.integers),
            self._stored(f"{weight.name}_scale", onnx_dtype(weight), self._by_channel(found.scale)),
        ]
        if not self.step.symmetric:
            inputs.append(self._stored(f"{weight.name}_zero_point", kind, self._by_channel(found.zero)))
        attributes = (
            {"axis": site.depth_axis, "block_size": self.step.block} if blocked else {"axis": site.channel_axis}
        )
        made = Variable(self.fresh(f"{weight.name}_dequantized"), weight.dtype, weight.shape)
        self._add("DequantizeLinear", home, site.node, inputs, made, **attributes)
        return made

    def _by_channel(self, values: Array) -> Array:
        """Beside the weight's axes where there are blocks; [channels] where each has one."""
        return values if self.step.block != "channel" else values.reshape(-1)

    def _stored(self, name: str, kind: int, values: Array) -> Constant:
        """A constant of this ONNX type, its bytes where the run keeps large ones."""
        return Constant(self.fresh(name), self.context.keep(kind, values))

    def _add(
        self, op: str, home: Node, user: Node, inputs: list[Tensor], output: Variable, **attributes: object
    ) -> None:
        node = Node(op, self.fresh(f"{output.name}/{op}"), attributes, inputs, [output])
        metadata(node).update(metadata(user))
        self.before.setdefault(id(home), []).append(node)

    def _place(self) -> None:
        """Bring what was made into the graph."""
        self.graph.nodes = [new for node in self.graph.nodes for new in (*self.before.get(id(node), ()), node)]
        self.before.clear()


def _spread(site: WeightSite, scales: Array) -> Array:
    """[depth], in a shape that broadcasts with the weight."""
    shape = [1] * len(site.weight.shape)
    shape[site.depth_axis] = -1
    return scales.reshape(shape)
