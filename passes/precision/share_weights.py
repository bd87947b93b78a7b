"""The pass `share-weights`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal

import numpy as np
import onnx
from pydantic import Field

from llmc.kernels.codebook_matmul.reference import pack
from llmc.passes.base import Context, LlmcError, Need, PassResult, Safety
from llmc.passes.graph import (
    DOMAIN,
    Array,
    Constant,
    Graph,
    Node,
    Tensor,
    Variable,
    copy_graph,
    fresh_names,
    metadata,
    outputs_of_scopes,
)
from llmc.passes.graph.in_parts import on_every_core, row_slices
from llmc.passes.opset import raise_opset
from llmc.passes.placement import Placement
from llmc.passes.precision.calibration import Calibration
from llmc.passes.precision.equal_weights import digest_of, share_equal
from llmc.passes.precision.rounding.codebooks import Layout, Shared, share
from llmc.passes.precision.rounding.moments import Moments, Source, gather
from llmc.passes.precision.selection import SelectivePass
from llmc.passes.precision.weight_sites import WeightSite, weight_sites

OPSET = 15
"""From which the body of CodebookMatMul is valid."""
MIB = 1 << 20


class ShareWeights(SelectivePass):
    """Stores weights as indices of 2 to 8 bits into codebooks of the values that they share.

    MatMul(x [..., K], W: constant [K, N]) → llmc CodebookMatMul(x, packed int32 [N, K / (32 // bits)], codebook [R, C,
    2^bits]), whose body of standard operators looks every value up and multiplies. Gemm too, with an Add for its bias.
    Codebooks have the type of the weight; there is one for the whole `tensor` (R = C = 1), one for each group of
    `rows` that has at least `values` weights, or one for each `block` of at least `values` weights of a row. Their
    entries are found by k-means, each weight counting by the mean square of what it multiplies on calibration data;
    the indices are then chosen one after another, each error made up for by the weights that are left. Where several
    products have equal weights, they share indices and codebooks.

    Weights that stay as they are, and are equal, or each other's transpose (an embedding and the head tied to it), are
    stored once, which loses nothing; `bits: null` does this alone.

    **Safety:** lossy. A layer whose output would move by more than `max_error` is left as it is.

    Source: Han et al., "Deep Compression" (2016); Kim et al., "SqueezeLLM" (2024); Frantar et al., "GPTQ" (2023).
    """

    after: ClassVar[tuple[str, ...]] = ("fold-constants",)
    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    safety: ClassVar[Safety] = "lossy"

    bits: Literal[2, 3, 4, 8] | None = Field(
        4, description="Bits of an index (3 take 3.2); null: share only what is equal."
    )
    codebook: Literal["tensor", "rows", "block"] = Field("rows", description="What has a codebook of its own.")
    values: int = Field(1024, ge=1, description="Least weights that share a codebook, but for 'tensor'.")
    max_error: float | None = Field(
        None, gt=0, description="Largest L2 norm by which a layer's output may move, over its own; null: no limit."
    )
    memory: int = Field(1024, gt=0, description="MiB for the statistics of activations.")
    calibration: Calibration = Field(Calibration(), description="Where activations come from.")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError for weights or activations that are not finite, and where there is no calibration data."""
        result = PassResult()
        if self.bits is not None:
            _Run(self, self.bits, graph, context, result).share()
        share_equal(graph, context, result)
        return result

    def layout(self, rows: int, depth: int) -> Layout:
        """How many groups of rows and blocks of columns have codebooks of their own."""
        if self.codebook == "tensor":
            return Layout(1, 1)
        if self.codebook == "rows":
            return Layout(rows // _divisor(rows, -(-self.values // depth)), 1)
        return Layout(rows, depth // _divisor(depth, self.values))


def _divisor(size: int, least: int) -> int:
    """The smallest divisor of `size` that is at least `least`; `size` where there is none."""
    return next((n for n in range(least, size) if size % n == 0), size)


@dataclass
class _Weight:
    """A matrix [rows, depth] and all products with it."""

    sites: list[WeightSite] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    """The activations that it multiplies, each once."""


class _Run:
    """One run of the pass over one graph."""

    def __init__(self, step: ShareWeights, bits: int, graph: Graph, context: Context, result: PassResult) -> None:
        self.step, self.bits, self.graph, self.context, self.done = step, bits, graph, context, result

    def share(self) -> None:
        weights = self._wanted()
        if not weights:
            return
        if self.graph.opset < OPSET:
            problem = raise_opset(self.graph, OPSET)
            if problem is not None:
                raise LlmcError(f"share-weights needs opset {OPSET}: {problem}; export the model at a newer opset")
            weights = self._wanted()
        self.fresh = fresh_names(self.graph)
        self.placement = Placement(self.graph, outputs_of_scopes(self.graph))
        for batch, moments in self._calibrated(weights):
            for weight in batch:
                first, *others = (moments[source].products for source in weight.sources)
                self._share(weight, sum(others, first))
        self.placement.finish()

    def _wanted(self) -> list[_Weight]:
        """The weights to share, in graph order; the reason why each other product stays as it is."""
        found = list(weight_sites(self.graph))
        refusals = self.step.refusals([node for node, site in found if isinstance(site, WeightSite)])
        weights: dict[str, _Weight] = {}
        for node, site in found:
            reason = refusals.get(id(node)) or (site if isinstance(site, str) else _obstacle(site))
            if reason or isinstance(site, str):
                self.done.kept[node.name] = str(reason)
                continue
            weight = weights.setdefault(digest_of(site.matrix()), _Weight())
            source = Source(site.activation.name, site.activation_axis, site.depth)
            weight.sites.append(site)
            weight.sources += [source] if source not in weight.sources else []
        return list(weights.values())

    def _calibrated(self, weights: list[_Weight]) -> Iterator[tuple[list[_Weight], dict[Source, Moments]]]:
        """Weights with what calibration tells of their activations, as many at a time as memory allows."""
        if self.context.activations is None:
            raise LlmcError("share-weights needs calibration data: give --calibration DATA")
        graph = copy_graph(self.graph)
        for batch in self._batches(weights):
            sources = list(dict.fromkeys(source for weight in batch for source in weight.sources))
            yield batch, gather(self.context.activations, graph, sources, self.step.calibration.samples)

    def _batches(self, weights: list[_Weight]) -> Iterator[list[_Weight]]:
        batch: list[_Weight] = []
        for weight in weights:
            sources = {source for other in (*batch, weight) for source in other.sources}
            if batch and sum(source.bytes for source in sources) > self.step.memory * MIB:
                yield batch
                batch = []
            batch.append(weight)
        if batch:
            yield batch

    def _share(self, weight: _Weight, hessian: Array) -> None:
        site = weight.sites[0]
        matrix = site.matrix()
        if not all(on_every_core(lambda rows: bool(np.isfinite(matrix[rows]).all()), row_slices(matrix.shape))):
            raise LlmcError(f"share-weights: weight '{site.weight.name}' of {site.node.name} has NaN or infinity")
        dtype = site.weight.dtype
        layout = self.step.layout(*matrix.shape)
        shared = share(matrix, layout, 1 << self.bits, hessian)
        error = _relative_error(matrix, shared, hessian)
        if self.step.max_error is not None and not error <= self.step.max_error:
            reason = f"its output would move by {error:.2%}, {self.step.max_error:.2%} may"
            self.done.kept.update((site.node.name, reason) for site in weight.sites)
            return
        name = site.weight.name
        packed = self._kept(f"{name}_indices", _packed(shared.indices, self.bits))
        codebook = self._kept(f"{name}_codebook", shared.codebooks.astype(dtype))
        count = "one codebook" if layout.count == 1 else f"{layout.count} codebooks"
        detail = f"'{name}' in {count} of {1 << self.bits} values: moves its output by {error:.2%}"
        for site in weight.sites:
            if self.context.apply(self.done, "ShareWeights", site.node, detail):
                self._replace(site, packed, codebook)
                self.done.asked[site.node.name] = f"int{self.bits} weights"

    def _kept(self, name: str, values: Array) -> Constant:
        """A constant whose bytes stand where the run keeps large ones."""
        kind = int(onnx.helper.np_dtype_to_tensor_dtype(values.dtype))
        return Constant(self.fresh(name), self.context.keep(kind, values))

    def _replace(self, site: WeightSite, packed: Constant, codebook: Constant) -> None:
        """CodebookMatMul in the place of the site's node, whose result it takes over."""
        node = site.node
        inputs: list[Tensor] = [site.activation, packed, codebook]
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        (result,) = node.outputs
        product = result if bias is None else Variable(self.fresh(f"{result.name}_product"), result.dtype, result.shape)
        made = [Node("CodebookMatMul", node.name, {"bits": self.bits}, inputs, [product], domain=DOMAIN)]
        if bias is not None:
            made.append(Node("Add", self.fresh(f"{node.name}/Add"), {}, [product, bias], [result]))
        for new in made:
            metadata(new).update(metadata(node))
        self.placement.after(node, made)
        self.placement.remove(node)


def _obstacle(site: WeightSite) -> str:
    """Why CodebookMatMul cannot take the place of a product; '' where nothing stands in the way."""
    node = site.node
    if len(site.weight.shape) != 2:
        return "its weight is no matrix"
    if site.position != 1:
        return "its weight is the left factor"
    if node.op == "Gemm" and node.attrs.get("transA"):
        return "its activation is transposed"
    if node.op == "Gemm" and (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)) != (1.0, 1.0):
        return "its alpha or beta is not 1"
    return "" if prod(site.weight.shape) else "its weight is empty"


def _packed(indices: Array, bits: int) -> Array:
    return np.concatenate(on_every_core(lambda rows: pack(indices[rows], bits), row_slices(indices.shape)))


def _relative_error(matrix: Array, shared: Shared, hessian: Array) -> float:
    """L2 norm of what sharing moves the output by, over that of the output."""

    def sums(part: slice) -> Array:
        rows = matrix[part].astype(np.float32)
        moved = shared.rows(part) - rows
        return np.array([((values @ hessian) * values).sum(dtype=np.float64) for values in (moved, rows)])

    noise, signal = map(float, np.sum(on_every_core(sums, row_slices(matrix.shape)), axis=0))
    return (noise / signal) ** 0.5 if signal > 0 else 0.0
