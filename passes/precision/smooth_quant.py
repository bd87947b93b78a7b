"""The pass `smooth-quant`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from llmc.passes.base import Context, LlmcError, NearMiss, Need, Pass, PassResult, Safety, Skip
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Tensor,
    Variable,
    fresh_names,
    metadata,
    module_of,
    outputs_of_scopes,
    rewire,
)
from llmc.passes.precision.bias import add_bias, bias_is_known
from llmc.passes.precision.calibration import Calibration
from llmc.passes.precision.channel_scaling import Refusal, divide, quotient
from llmc.passes.precision.rows import Rows, Stack, batched, gather_rows
from llmc.passes.precision.selection import SelectivePass
from llmc.passes.precision.smoothing import ALPHAS, Smoothing, find_smoothing
from llmc.passes.precision.weight_sites import WeightSite, weight_sites

MIB = 1 << 20
WORTH = 0.95
"""A smoothing that leaves more than this part of the error is not done."""


class SmoothQuant(SelectivePass):
    """Makes activations easier to quantize: the ranges of their channels go to the weights that they meet.

    MatMul(x [.., K], W [K, N]), or Gemm → MatMul((x - z) / s, s · W) + z · W, s and z [K], of the type of x, for all
    products of one x together. s[k] = max|x[k]|^a / max|W[k]|^(1-a); a is searched for each x: the one with which
    the INT8 products are nearest to the float ones, on rows of the calibration data that it was not fitted to. z is the
    middle of the channel's range, where `shift` is on: symmetric INT8 then wastes no level on a skewed channel, such as
    those that GELU gives. The division goes into the constants of the normalisation or product before, through
    Attention's values too; where nothing can take it, a Mul stands before the products, which TensorRT fuses with what
    makes x. z · W goes into the bias. Stands before quantize-int8, which then quantizes what is left, or without
    `shift` before quantize-dynamic, which corrects no biases.

    **Safety:** tolerance: exact but for rounding, 1e-5 relative in float32.

    Source: Xiao et al., "SmoothQuant" (2023); Wei et al., "Outlier Suppression+" (2023), for the shift.
    """

    after: ClassVar[tuple[str, ...]] = ("fold-constants",)
    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    safety: ClassVar[Safety] = "tolerance"

    alpha: float | None = Field(
        None, ge=0, le=1, description="How much of an activation's range goes to the weight; null: searched for each."
    )
    shift: bool = Field(False, description="Move each channel's range to both sides of 0 evenly, too.")
    insert_mul: bool = Field(True, description="A Mul where the division cannot go into constants; else left alone.")
    memory: int = Field(1024, gt=0, description="MiB for rows of activations at one time.")
    calibration: Calibration = Field(Calibration(), description="Where activations come from.")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError for activations that are not finite, and where there is no calibration data."""
        if context.activations is None:
            raise LlmcError("smooth-quant needs calibration data: give some with --calibration DATA")
        context.infer_shapes(graph)
        result = PassResult()
        groups = self._groups(graph, result)
        if not groups:
            raise Skip("no MatMul or Gemm multiplies an activation by a constant weight")
        by_name = {group.tensor.name: group for group in groups}
        editor = _Editor(graph, self, context, result)
        smoothings: dict[str, Smoothing] = {}
        for part in batched({name: group.sites[0].depth for name, group in by_name.items()}, self.memory * MIB):
            rows = gather_rows(context.activations, graph, part, self.calibration.samples)
            smoothings |= {name: self._find(by_name[name], rows[name]) for name in part}
        for name, smoothing in smoothings.items():
            editor.smooth(by_name[name], smoothing)
        return result

    def _groups(self, graph: Graph, result: PassResult) -> list[_Group]:
        """The products to smooth, by the activation that they share, in graph order."""
        sites = list(weight_sites(graph))
        refusals = self.refusals([node for node, _ in sites])
        groups: dict[int, _Group] = {}
        for node, site in sites:
            reason = refusals.get(id(node)) or (site if isinstance(site, str) else _unfit(site))
            if reason is not None:
                result.near_misses.append(NearMiss("SmoothQuant", node.name, reason, module_of(node)))
            elif isinstance(site, WeightSite):
                groups.setdefault(id(site.activation), _Group(site.activation, [])).sites.append(site)
        return list(groups.values())

    def _find(self, group: _Group, rows: Rows) -> Smoothing:
        weight = Stack([site.view() for site in group.sites])
        return find_smoothing(rows, weight, self.shift, ALPHAS if self.alpha is None else (self.alpha,))


def uncorrected_shift(earlier: Pass) -> str | None:
    """Why a pass that quantizes without bias correction must not stand after `earlier`.

    Most values lie far from the middle of their channel's range: what rounding the weights does to that distance is
    alike for all rows, and only a bias takes it back. MiniLM's embeddings keep a cosine of 0.9986 with the correction,
    of 0.908 without.
    """
    if isinstance(earlier, SmoothQuant) and earlier.shift:
        return "what 'shift' moves makes errors that only bias correction takes back: leave shift out"
    return None


@dataclass(frozen=True)
class _Group:
    """Products of one activation."""

    tensor: Tensor
    sites: list[WeightSite]

    @property
    def nodes(self) -> list[Node]:
        return [site.node for site in self.sites]


def _unfit(site: WeightSite) -> str | None:
    if site.activation_axis != -1:
        return "it sums over another axis of its activation than the last"
    if len(site.weight.shape) != 2:
        return "its weight is more than one matrix"
    return None if bias_is_known(site.node) else "its bias is not constant"


class _Editor:
    """Writes smoothings into the graph."""

    def __init__(self, graph: Graph, step: SmoothQuant, context: Context, result: PassResult) -> None:
        self.graph, self.step, self.context, self.result = graph, step, context, result
        self.fresh = fresh_names(graph)
        self.outputs = outputs_of_scopes(graph)

    def smooth(self, group: _Group, found: Smoothing) -> None:
        first, tensor = group.nodes[0], group.tensor
        errors = f"the INT8 product's error from {found.plain_error:.3%} to {found.error:.3%}"
        if not found.error <= WORTH * found.plain_error:
            self._miss(first, f"smoothing '{tensor.name}' would bring {errors}")
            return
        divisions = divide(tensor, found.scale, group.nodes, self.outputs)
        if isinstance(divisions, Refusal) and not self.step.insert_mul:
            self._miss(first, f"{divisions}; 'insert_mul' would divide it")
            return
        where = "by a Mul" if isinstance(divisions, Refusal) else "in the constants before it"
        detail = f"'{tensor.name}' divided {where}, alpha {found.alpha}: {errors}"
        if not self.context.apply(self.result, "SmoothQuant", first, detail):
            return
        for site in group.sites:
            if found.offset.any():
                added = _of_offset(site, found.offset).astype(site.weight.dtype)
                add_bias(self.graph, site.node, added, self.outputs, self.fresh)
            inverse = _along(site, 1 / found.scale)
            rewire([(site.node, site.position, quotient(site.weight, inverse, self.fresh))])
        if isinstance(divisions, Refusal):
            tensor = self._before(group, "Mul", tensor, 1 / found.scale)
        else:
            for division in divisions:
                division.apply(self.fresh)
        if found.offset.any():
            self._before(group, "Sub", tensor, found.offset / found.scale)

    def _miss(self, node: Node, reason: str) -> None:
        self.result.near_misses.append(NearMiss("SmoothQuant", node.name, reason, module_of(node)))

    def _before(self, group: _Group, op: str, tensor: Tensor, values: Array) -> Variable:
        """Put an operator with a constant between `tensor` and the group's products."""
        user = group.nodes[0]
        made = Variable(self.fresh(f"{tensor.name}_smooth"), tensor.dtype, tensor.shape)
        constant = Constant(self.fresh(f"{tensor.name}_channels"), values.astype(tensor.dtype))
        node = Node(op, self.fresh(f"{made.name}/{op}"), {}, [tensor, constant], [made])
        metadata(node).update(metadata(user))
        position = next(i for i, other in enumerate(self.graph.nodes) if other is user)
        self.graph.nodes.insert(position, node)
        rewire([(site.node, 1 - site.position, made) for site in group.sites])
        return made


def _of_offset(site: WeightSite, offset: Array) -> Array:
    """What a product makes of the offset [depth] of its activation: float64 [outputs]."""
    wide = offset.astype(np.float64)
    return np.concatenate(Stack([site.view()]).each(lambda _, weight: wide @ weight.T))


def _along(site: WeightSite, values: Array) -> Array:
    """[depth], in a shape that broadcasts with the weight."""
    shape = [1] * len(site.weight.shape)
    shape[site.depth_axis] = -1
    return values.reshape(shape)
