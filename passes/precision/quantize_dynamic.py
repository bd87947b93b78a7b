"""The pass `quantize-dynamic`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx

from llmc.passes.base import Context, LlmcError, Pass, PassResult, Safety, Skip
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Rowwise,
    Tensor,
    Variable,
    constant_value,
    fresh_names,
    loaded,
    metadata,
    rows_of,
    unlink,
)
from llmc.passes.opset import raise_opset
from llmc.passes.precision.levels import INT8
from llmc.passes.precision.rows import Stack
from llmc.passes.precision.selection import SelectivePass
from llmc.passes.precision.smooth_quant import uncorrected_shift
from llmc.passes.precision.weight_sites import WeightSite, weight_sites

SINCE = 11
"""The opset that DynamicQuantizeLinear came with."""
FLOAT32 = np.dtype(np.float32)


class QuantizeDynamic(SelectivePass):
    """Multiplies in INT8 with activations quantized as they come: no calibration, for ONNX Runtime on CPUs.

    MatMul(x, W [K, N]) → Mul(Cast(MatMulInteger(q, W8, z)), s · t), with q uint8, s float32 [], z uint8 [] =
    DynamicQuantizeLinear(x), shared by all products of x, and W8 int8 [K, N], t float32 [N] = max|W[:, n]| / 127. Gemm
    likewise, its bias added after. ONNX Runtime fuses the five nodes into one. TensorRT has none of these operators.
    One range holds for all of x: what stands together in a batch shares it.

    **Safety:** lossy. Each value of x moves by at most half of 1/255 of its range, each of W by half of t.

    Source: ONNX operator specifications, DynamicQuantizeLinear and MatMulInteger.
    """

    after: ClassVar[tuple[str, ...]] = ("fold-constants",)
    safety: ClassVar[Safety] = "lossy"

    def conflict(self, earlier: Pass) -> str | None:
        """As `Pass.conflict`: it has no data to correct biases by."""
        return uncorrected_shift(earlier)

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError for a pattern that matches nothing, and for weights that are not finite."""
        result = PassResult()
        problem = raise_opset(graph, SINCE)
        if problem is not None:
            raise LlmcError(f"quantize-dynamic needs opset {SINCE}: {problem}; export the model at a newer opset")
        context.infer_shapes(graph)
        sites = list(weight_sites(graph))
        if not sites:
            raise Skip("the graph has no MatMul or Gemm")
        refusals = self.refusals([node for node, _ in sites])
        editor = _Editor(graph)
        for node, site in sites:
            reason = refusals.get(id(node)) or (site if isinstance(site, str) else _unfit(site))
            if reason is not None:
                result.kept[node.name] = reason
            elif isinstance(site, WeightSite) and context.apply(result, "QuantizeDynamic", node, _detail(site)):
                editor.quantize(site)
                result.asked[node.name] = "int8"
        editor.finish()
        return result


def _detail(site: WeightSite) -> str:
    return f"'{site.weight.name}' per channel, '{site.activation.name}' as it comes"


def _unfit(site: WeightSite) -> str | None:
    if np.dtype(site.weight.dtype) != FLOAT32:
        return "DynamicQuantizeLinear takes float32 only"
    if len(site.weight.shape) != 2:
        return "its weight is more than one matrix"
    if site.position != 1 or site.activation_axis != -1:
        return "its weight stands on the left, or its activation is transposed"
    return None


class _Editor:
    """Writes the integer products; an activation is quantized once."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.fresh = graph, fresh_names(graph)
        self.quantized: dict[int, list[Variable]] = {}
        """id of an activation → its levels, scale and zero point."""
        self.instead: dict[int, list[Node]] = {}
        """id of a product → what stands in its place."""

    def quantize(self, site: WeightSite) -> None:
        node, made = site.node, self.instead.setdefault(id(site.node), [])
        levels, scale, zero = self._activation(site, made)
        weight, steps = self._weight(site)
        name = node.outputs[0].name
        sums = self._add(made, node, "MatMulInteger", [levels, weight, zero], f"{name}_sums", np.int32)
        wide = self._add(made, node, "Cast", [sums], f"{name}_float", np.float32, to=onnx.TensorProto.FLOAT)
        factor = self._add(made, node, "Mul", [scale, steps], f"{name}_scale", np.float32)
        result = node.outputs[0]
        added = self._added(node)
        if added is None:
            self._add(made, node, "Mul", [wide, factor], result)
        else:
            product = self._add(made, node, "Mul", [wide, factor], f"{name}_product", np.float32)
            self._add(made, node, "Add", [product, added], result)

    def _activation(self, site: WeightSite, made: list[Node]) -> list[Variable]:
        x = site.activation
        if id(x) not in self.quantized:
            outputs = [
                Variable(self.fresh(f"{x.name}_{part}"), np.dtype(dtype), shape)
                for part, dtype, shape in (
                    ("levels", np.uint8, x.shape),
                    ("scale", np.float32, []),
                    ("zero", np.uint8, []),
                )
            ]
            node = Node("DynamicQuantizeLinear", self.fresh(f"{x.name}/DynamicQuantizeLinear"), {}, [x], outputs)
            metadata(node).update(metadata(site.node))
            made.append(node)
            self.quantized[id(x)] = outputs
        return self.quantized[id(x)]

    def _weight(self, site: WeightSite) -> tuple[Constant, Constant]:
        """The levels int8 [K, N], and the steps between them float32 [N], Gemm's alpha among them."""
        peaks = np.concatenate(Stack([site.view()]).each(lambda _, weight: np.abs(weight).max(axis=1, initial=0)))
        if not np.isfinite(peaks).all():
            raise LlmcError(f"quantize-dynamic: weight '{site.weight.name}' of {site.node.name} has NaN or infinity")
        steps, held, turned = INT8.scales(peaks, FLOAT32), site.weight._values, site.depth_axis == 1

        def levels(rows: slice) -> Array:
            return INT8.quantize(loaded(held)[:, rows].T if turned else rows_of(held, rows), steps)

        name = site.weight.name
        stored = Rowwise(onnx.TensorProto.INT8, (site.depth, len(peaks)), levels)
        alpha = np.float32(site.node.attrs.get("alpha", 1.0))
        return Constant(self.fresh(f"{name}_int8"), stored), Constant(self.fresh(f"{name}_scale"), steps * alpha)

    def _added(self, node: Node) -> Tensor | None:
        """Gemm's C times its beta."""
        if node.op != "Gemm" or len(node.inputs) < 3 or node.inputs[2].is_empty():
            return None
        beta = float(node.attrs.get("beta", 1.0))
        if beta == 1.0:
            return node.inputs[2]
        value = constant_value(node.inputs[2])
        if value is not None:
            return Constant(self.fresh(f"{node.inputs[2].name}_beta"), (value * beta).astype(value.dtype))
        made = self.instead[id(node)]
        factor = Constant(self.fresh(f"{node.name}_beta"), np.float32(beta).reshape(()))
        return self._add(made, node, "Mul", [node.inputs[2], factor], f"{node.name}_bias", np.float32)

    def _add(
        self,
        made: list[Node],
        user: Node,
        op: str,
        inputs: list[Tensor],
        output: Tensor | str,
        dtype: type[np.generic] = np.float32,
        **attributes: int,
    ) -> Tensor:
        """A node for `user`, whose result `output` it takes over, or makes under that name."""
        if isinstance(output, str):
            output = Variable(self.fresh(output), np.dtype(dtype))
        else:
            unlink(user)
        node = Node(op, self.fresh(f"{output.name}/{op}"), attributes, inputs, [output])
        metadata(node).update(metadata(user))
        made.append(node)
        return output

    def finish(self) -> None:
        """Put everything in its place."""
        self.graph.nodes = [new for node in self.graph.nodes for new in self.instead.get(id(node), [node])]
