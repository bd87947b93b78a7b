"""Products in fewer bits: what the passes `quantize-int8` and `quantize-fp8` have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar, Literal, get_args

from pydantic import Field

from llmc.passes.base import Context, LlmcError, Measured, Need, Pass, PassResult, Skip
from llmc.passes.graph import Array, Graph, Node, copy_graph, fresh_names, infer_shapes, outputs_of_scopes, scopes
from llmc.passes.opset import raise_opset
from llmc.passes.precision.bias import add_bias, bias_is_known
from llmc.passes.precision.calibration import Clipping
from llmc.passes.precision.clip_search import searched
from llmc.passes.precision.insert_qdq import Inserter
from llmc.passes.precision.levels import Levels
from llmc.passes.precision.products import SINCE, Product, as_product, is_operator
from llmc.passes.precision.quantized_twins import Loss, losses
from llmc.passes.precision.selection import SelectivePass
from llmc.passes.precision.smooth_quant import uncorrected_shift

Operator = Literal["MatMul", "Gemm", "Conv", "ConvTranspose"]
PRODUCTS: frozenset[str] = frozenset(get_args(Operator))
OTHERS = frozenset({"Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN"})
"""Operators that multiply too; the report says that they stay as they are."""


class QuantizeProducts(SelectivePass):
    """What both passes take, and do, with the type that `levels` says."""

    levels: ClassVar[Levels]
    after: ClassVar[tuple[str, ...]] = ("fold-constants",)
    needs: ClassVar[tuple[Need, ...]] = ("activations",)

    operators: list[Operator] = Field(
        ["MatMul", "Gemm", "Conv"],
        description="Operators to quantize. In TensorRT-RTX, ConvTranspose saves space only.",
    )
    attention: bool = Field(False, description="Quantize products of two activations too (Q·Kᵀ and weights·V).")
    correct_bias: bool = Field(
        True, description="Take the mean error of each output channel, on the calibration data, out of the bias."
    )
    calibration: Clipping = Field(Clipping(), description="Where the scales of activations come from.")

    def conflict(self, earlier: Pass) -> str | None:
        """As `Pass.conflict`: not every choice of parameters corrects biases."""
        corrects = self.correct_bias and not self.calibration.scales_alone
        return None if corrects else uncorrected_shift(earlier)

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError for a pattern that matches nothing, and for weights or activations that are not finite."""
        if self.attention:
            infer_shapes(graph)
        products, result = self._survey(graph)
        needed = max((max(SINCE[product.dtype], self.levels.since) for product in products), default=0)
        if graph.opset < needed:
            problem = raise_opset(graph, needed)
            if problem is not None:
                raise LlmcError(f"{self.key()} needs opset {needed}: {problem}; export the model at a newer opset")
            products, result = self._survey(graph)
        if not products and not result.kept:
            raise Skip(f"the graph has no {', '.join(sorted(PRODUCTS))}")
        amax = self._calibrate(graph, products, context)
        loud = []
        for index, product in enumerate(products):
            silent = next((name for name in product.names if amax[name] == 0), None)
            if silent is None:
                loud.append(index)
            else:
                result.kept[product.node.name] = f"its input '{silent}' is 0 throughout the calibration data"
        if self.correct_bias and self.calibration.scales_alone:
            result.warnings.append(
                "biases are not corrected: that needs calibration.data beside calibration.statistics"
            )
        measured = self._measure(graph, products, loud, amax, context)
        inserter, biases, quantized = Inserter(graph, self.levels), [], set()
        for index in loud:
            product, loss = products[index], measured.get(index)
            detail = product.describe(amax) + (f"; moves its result by {loss.relative:.2%}" if loss else "")
            if context.apply(result, type(self).__name__, product.node, detail):
                inserter.quantize(product, amax)
                quantized.add(id(product.node))
                result.asked[product.node.name] = self.levels.numpy.name
                if loss is not None and loss.bias is not None and bias_is_known(product.node):
                    biases.append((product.node, loss.bias.astype(product.dtype)))
        self._besides(graph, quantized, inserter, context, result)
        inserter.finish()
        result.scales = inserter.scales
        _correct(graph, biases)
        if not loud:
            result.warnings.append("nothing was quantized; the report says why for each node")
        return result

    def _others(self, _graph: Graph) -> list[Node]:
        """Nodes that `include` and `exclude` name beside products."""
        return []

    def _besides(
        self, graph: Graph, quantized: Collection[int], inserter: Inserter, context: Context, result: PassResult
    ) -> None:
        """Let others read quantized activations beside the nodes with the ids `quantized`."""

    def _refusals(self, graph: Graph) -> dict[int, str]:
        return self.refusals([node for node in graph.nodes if is_operator(node, PRODUCTS)], self._others(graph))

    def _survey(self, graph: Graph) -> tuple[list[Product], PassResult]:
        """What to quantize, in graph order, and a result that holds why each other product is left alone."""
        result = PassResult()
        refusals = self._refusals(graph)
        products = []
        for node in graph.nodes:
            if is_operator(node, PRODUCTS | OTHERS):
                found = self._refusal(node) or refusals.get(id(node)) or as_product(node, self.attention)
                if isinstance(found, str):
                    result.kept[node.name] = found
                else:
                    products.append(found)
        for scope in scopes(graph)[1:]:
            for node in scope.nodes:
                if is_operator(node, PRODUCTS | OTHERS):
                    result.kept[node.name] = "inside a subgraph: its tensors cannot be calibrated"
        return products, result

    def _measure(
        self, graph: Graph, products: list[Product], chosen: list[int], amax: Mapping[str, float], context: Context
    ) -> dict[int, Loss]:
        """What each chosen product, by its place in the survey, loses by it while all before it is float."""
        activations, samples = context.activations, self.calibration.samples
        if not chosen or not self.correct_bias or activations is None or self.calibration.scales_alone:
            return {}
        index_of = {products[index].node.outputs[0].name: index for index in chosen}

        def measure(names: Sequence[str]) -> dict[str, Measured]:
            twin = copy_graph(graph)
            found, _ = self._survey(twin)
            same = [found[index_of[name]] for name in names]
            measured = losses(twin, same, self.levels, amax, activations, samples)
            return {name: loss.measured() for name, loss in zip(names, measured, strict=True)}

        wanted = {
            name: [self.levels.name, {tensor: amax[tensor] for tensor in products[index].names}]
            for name, index in index_of.items()
        }
        found = activations.recall(graph, losses.__module__, wanted, samples, measure)
        return {index: Loss.of(products[index].channels, found[name]) for name, index in index_of.items()}

    def _refusal(self, node: Node) -> str | None:
        if node.op in OTHERS:
            hint = "; decompose-attention makes products of it" if node.op == "Attention" else ""
            return f"this pass does not quantize {node.op}{hint}"
        if node.op not in self.operators:
            return f"{node.op} is not among the operators to quantize"
        return None

    def _calibrate(self, graph: Graph, products: list[Product], context: Context) -> Mapping[str, float]:
        if not products:
            return {}
        if context.activations is None:
            raise LlmcError(f"{self.key()} needs calibration data: give some with --calibration DATA")
        names, samples = list(dict.fromkeys(n for product in products for n in product.names)), self.calibration.samples
        if self.calibration.method == "search":
            return searched(graph, names, self.levels, context.activations, samples)
        return context.activations.amax(
            graph,
            names,
            method=self.calibration.method,
            percentile=self.calibration.percentile,
            samples=samples,
        )


def _correct(graph: Graph, biases: Iterable[tuple[Node, Array]]) -> None:
    """Add to what products give what they lack on average."""
    outputs, fresh = outputs_of_scopes(graph), fresh_names(graph)
    for node, bias in biases:
        add_bias(graph, node, bias, outputs, fresh)
