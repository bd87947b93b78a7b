"""Computing in 16 bits: what the passes `convert-fp16` and `convert-bf16` have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import isfinite
from typing import ClassVar, Literal

from pydantic import Field

from llmc.passes.base import Context, Need, Pass, PassResult, Skip
from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    infer_shapes,
    numpy_dtype,
    onnx_dtype,
    outputs_of_scopes,
    scopes,
    shape_of,
)
from llmc.passes.opset import raise_opset
from llmc.passes.precision.half import (
    NEEDS_FLOAT32,
    SQUARES,
    Form,
    Half,
    half_form,
    is_fill,
    lowest_finite,
    magnitude,
    misfit,
)
from llmc.passes.precision.half_twins import DEEPEST, find_lossy
from llmc.passes.precision.retype import Retyping
from llmc.passes.precision.selection import LANGUAGE, Pattern, named
from llmc.passes.simplify.evaluate import MOVE

UNTRIED = MOVE | {"Cast", "ConstantOfShape", "DequantizeLinear", "QuantizeLinear"}
"""Operators that round their input, or nothing."""
MASKING = MOVE | {"Add", "Cast", "Max", "Min", "Mul"}
"""Operators that a mask may pass on its way to a softmax."""


class ConvertHalf(Pass):
    """What both passes take, and do, with the type that `half` says."""

    half: ClassVar[Half]
    needs: ClassVar[tuple[Need, ...]] = ("activations",)

    keep: list[Pattern] = Field([], description=f"Leave these nodes as they are: {LANGUAGE}.")
    inputs_outputs: Literal["keep", "convert"] = Field(
        "keep",
        description="Whether inputs and outputs of the graph stay as they are or change too; static caches do.",
    )
    margin: float = Field(
        4.0, ge=1, description="Headroom: how many times larger than measured an activation may become."
    )
    loss: float = Field(
        16.0,
        gt=1,
        description="How far off a node may be, by rounding what it reads and gives, in roundings of one number.",
    )

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError for a pattern of `keep` that matches nothing."""
        result = PassResult()
        self._raise_opset(graph, result)
        infer_shapes(graph)
        decisions = _Decisions(self, graph, context, result)
        if not decisions.forms and not result.kept:
            others = " or ".join(sorted(numpy_dtype(kind).name for kind in self.half.sources))
            raise Skip(f"nothing in the graph is {others}")
        forms: dict[int, Form] = {}
        for node, form in decisions.to_convert():
            if not context.apply(result, self.key(), node, decisions.detail(node)):
                continue
            forms[id(node)] = form
            if node.op not in MOVE and node.op != "Cast":
                result.asked[node.name] = self.half.name
        if forms:
            border = self.border(graph, forms)
            Retyping(graph, self.half, forms, decisions.masks, decisions.misfits, border).run()
        return result

    def _raise_opset(self, graph: Graph, result: PassResult) -> None:
        """To where operators of the graph have a form in this type that they do not have yet."""
        infer_shapes(graph)
        missing = [
            node.op
            for node in graph.nodes
            if isinstance(half_form(node, graph.opset, self.half), str)
            and isinstance(half_form(node, self.half.opset, self.half), Form)
        ]
        if graph.opset < self.half.opset and missing:
            problem = raise_opset(graph, self.half.opset)
            if problem is not None:
                result.warnings.append(f"{' and '.join(sorted(set(missing)))} stay as they are: {problem}")

    def border(self, graph: Graph, half: Collection[int]) -> set[int]:
        """Ids of the inputs and outputs that become float16 where these nodes do; static caches always do."""
        if self.inputs_outputs == "convert":
            return {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
        scatters = [node for node in graph.nodes if node.op == "TensorScatter" and id(node) in half]
        ends = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
        return {id(tensor) for node in scatters for tensor in (node.inputs[0], node.outputs[0])} & ends


class _Decisions:
    """Which nodes of the graph change, and why the others do not.

    `forms`: id of each outer node that has a form in `half` → that form. `misfits`: id of a tensor → why they cannot
    hold it. `masks`: ids of the nodes on the way from a number that stands for minus infinity to a softmax; `masked`:
    ids of the tensors between them.
    """

    def __init__(self, settings: ConvertHalf, graph: Graph, context: Context, result: PassResult) -> None:
        self.settings, self.graph, self.result = settings, graph, result
        self.half = settings.half
        self.given_back = outputs_of_scopes(graph)
        self.forms: dict[int, Form] = {}
        self.kept: dict[int, str] = {}
        self.misfits: dict[int, str] = {}
        self.masks: set[int] = set()
        self.masked: set[int] = set()
        self._fills: dict[int, bool] = {}
        for node in graph.nodes:
            form = half_form(node, graph.opset, self.half)
            if any(True for _ in node.subgraphs()):
                self.keep(node, "it has a subgraph")
            elif isinstance(form, Form):
                self.forms[id(node)] = form
            elif form is not None:
                self.keep(node, form)
        for scope in scopes(graph)[1:]:
            for node in scope.nodes:
                if half_form(node, graph.opset, self.half) is not None:
                    self.keep(node, "it is inside a subgraph")
        self._find_masks()
        self._keep_by_operator()
        self._keep_exact()
        self._keep_what_does_not_fit(context)
        self._keep_what_loses(context)

    def keep(self, node: Node, reason: str) -> None:
        """Leave the node as it is; the first reason counts."""
        if id(node) not in self.kept:
            self.kept[id(node)] = reason
            if node.op not in MOVE:
                self.result.kept[node.name] = reason

    def to_convert(self) -> list[tuple[Node, Form]]:
        """The nodes that change, in graph order; data movement among those that do not is left with them."""
        half = {key for key in self.forms if key not in self.kept}
        moved = self._moved_as_it_is(half)
        nodes = [node for node in self.graph.nodes if id(node) in half and id(node) not in moved]
        return [(node, self.forms[id(node)]) for node in nodes]

    def detail(self, node: Node) -> str:
        """What else changes with the node, for the report."""
        fills = [c for c in _constants(node) if id(node) in self.masks and self._is_fill(c)]
        lowest = [(c.name, lowest_finite(c)) for c in fills]
        return ", ".join(
            f"{value:.4g} in '{name}' becomes {self.half.fill:.5g}"
            for name, value in lowest
            if value < -self.half.largest
        )

    def _find_masks(self) -> None:
        """Follow numbers that stand for minus infinity to where nothing but a softmax reads them."""
        leads: set[int] = set()
        for node in reversed(self.graph.nodes):
            if node.op in MASKING and all(self._only_for_softmax(t, leads) for t in node.outputs):
                leads.add(id(node))
        for node in self.graph.nodes:
            if id(node) in leads:
                masked = any(id(t) in self.masked for t in node.inputs)
                if masked or any(self._is_fill(c) for c in _constants(node)):
                    self.masks.add(id(node))
                    self.masked.update(id(t) for t in node.outputs)
            elif any(isinstance(t, Constant) and self._is_fill(t) for t in _mask_inputs(node)):
                self.masks.add(id(node))

    def _is_fill(self, constant: Constant) -> bool:
        if id(constant) not in self._fills:
            self._fills[id(constant)] = onnx_dtype(constant) in self.half.sources and is_fill(constant, self.half)
        return self._fills[id(constant)]

    def _only_for_softmax(self, tensor: Tensor, leads: set[int]) -> bool:
        if id(tensor) in self.given_back or not tensor.outputs:
            return False
        return all(id(user) in leads or any(t is tensor for t in _mask_inputs(user)) for user in tensor.outputs)

    def _keep_by_operator(self) -> None:
        nodes = [node for scope in scopes(self.graph) for node in scope.nodes]
        asked = named(nodes, self.settings.keep, f"{self.settings.key()}: keep")
        for node in self.graph.nodes:
            if id(node) not in self.forms:
                continue
            if id(node) in asked:
                self.keep(node, f"`keep` names it: '{asked[id(node)]}'")
            elif node.op in NEEDS_FLOAT32:
                self.keep(node, NEEDS_FLOAT32[node.op].format(half=self.half.name, whole=self.half.whole))

    def _keep_exact(self) -> None:
        """Keep what angles and integers are computed from, back to the nearest product with a weight."""
        matrices = set(_weight_matrices(self.graph))
        wanted: dict[int, str] = {}
        for node in reversed(self.graph.nodes):
            reason = next((wanted[id(t)] for t in node.outputs if id(t) in wanted), None)
            if node.op in ("Sin", "Cos"):
                reason = f"{_called(node)} needs its angle exactly, {self._holds_whole('angles')}"
            elif node.op == "Cast" and numpy_dtype(node.attrs["to"]).kind in "iu":
                reason = f"{_called(node)} makes it an integer, {self._holds_whole('numbers')}"
            elif any(id(t) in matrices for t in node.inputs):
                continue
            if reason is not None:
                if id(node) in self.forms:
                    self.keep(node, reason)
                wanted.update((id(t), reason) for t in node.inputs if t.inputs and onnx_dtype(t) in self.half.sources)

    def _holds_whole(self, what: str) -> str:
        return f"{self.half.name} holds {what} above {self.half.whole} to whole numbers at best"

    def _keep_what_does_not_fit(self, context: Context) -> None:
        peaks = self._peaks(context)
        for node in self.graph.nodes:
            form = self.forms.get(id(node))
            if form is None:
                continue
            inputs = [*(node.inputs[i] for i in sorted(form.inputs)), *_attribute_constants(node)]
            outputs = [node.outputs[i] for i in sorted(form.outputs)]
            for tensor in (*inputs, *outputs):
                reason = self._misfit(node, tensor, peaks)
                if reason:
                    self.misfits[id(tensor)] = reason
                    self.keep(node, reason)
            if node.op in MOVE and any(id(t) in self.misfits for t in inputs):
                self.misfits.update((id(t), self.kept[id(node)]) for t in outputs)
            if node.op in SQUARES:
                self._check_square(node, peaks)

    def _keep_what_loses(self, context: Context) -> None:
        """Keep nodes that rounding puts further off than the settings allow, and what has to be exact before them."""
        tried = [
            node.name
            for node in self.graph.nodes
            if id(node) in self.forms and id(node) not in self.kept and node.op not in UNTRIED and self._is_tried(node)
        ]
        if context.activations is None or not tried:
            return
        limit = self.settings.loss / self.half.whole
        border = self.settings.inputs_outputs == "convert"
        lossy = find_lossy(self.graph, tried, self.half, limit, context.activations, border=border)
        for node in self.graph.nodes:
            if node.name in lossy.kept and id(node) in self.forms:
                self.keep(node, lossy.kept[node.name])
        half = self.half.name
        self.result.warnings += [
            f"'{name}' is {loss:.2%} off on the data in {half}, and with {DEEPEST} nodes before it as they are too"
            for name, loss in lossy.hopeless.items()
        ]

    def _is_tried(self, node: Node) -> bool:
        """Whether the node's first result is a number of its own, no mask, and not quantized."""
        tensors = [*node.inputs, *node.outputs]
        return 0 in self.forms[id(node)].outputs and not any(id(tensor) in self.masked for tensor in tensors)

    def _misfit(self, node: Node, tensor: Tensor, peaks: Mapping[str, float]) -> str:
        if isinstance(tensor, Constant):
            if id(node) in self.masks and self._is_fill(tensor):
                return ""
            if node.op == "Clip" and tensor is not node.inputs[0] and magnitude(tensor) > self.half.largest:
                return ""
            return misfit(tensor, self.half, scale=node.op in ("QuantizeLinear", "DequantizeLinear"))
        if id(tensor) in self.misfits:
            return self.misfits[id(tensor)]
        if id(tensor) in self.masked and id(tensor.inputs[0]) in self.kept:
            kind = numpy_dtype(onnx_dtype(tensor)).name
            return f"'{tensor.name}' holds {kind} numbers that stand for minus infinity"
        peak = peaks.get(tensor.name, 0.0)
        if not isfinite(peak):
            return f"'{tensor.name}' is not finite on the data"
        if 0 < peak < self.half.smallest:
            return f"'{tensor.name}' stays under {peak:.4g} on the data, where {self.half.name} loses bits"
        if peak * self.settings.margin > self.half.largest:
            end = self.half.largest / self.settings.margin
            return f"'{tensor.name}' reaches {peak:.4g} on the data, over {end:.5g} = {self.half.largest:.5g} / margin"
        return ""

    def _check_square(self, node: Node, peaks: Mapping[str, float]) -> None:
        peak = peaks.get(node.inputs[0].name, 0.0)
        if peak**2 * self.settings.margin > self.half.largest:
            self.keep(node, f"it squares '{node.inputs[0].name}', which reaches {peak:.4g} on the data")

    def _peaks(self, context: Context) -> Mapping[str, float]:
        """Name → largest magnitude on the data, of the tensors to change that are neither masks nor moved values."""
        tensors = [t for t in self.graph.inputs if onnx_dtype(t) in self.half.sources]
        for node in self.graph.nodes:
            if id(node) in self.forms and node.op not in MOVE:
                tensors += [
                    t for i in sorted(self.forms[id(node)].outputs) if id(t := node.outputs[i]) not in self.masked
                ]
        if context.activations is None:
            self.result.warnings.append("no activations were measured: only constants were checked for overflow")
            return {}
        return context.activations.absolute_maximum(self.graph, [t.name for t in tensors])

    def _moved_as_it_is(self, half: set[int]) -> set[int]:
        """Data movement between nodes that stay as they are: converting it would only add Casts."""
        halves: set[int] = set()
        halves.update(self.settings.border(self.graph, half) & {id(t) for t in self.graph.inputs})
        candidates: set[int] = set()
        for node in self.graph.nodes:
            if id(node) not in half:
                continue
            form = self.forms[id(node)]
            variables = [node.inputs[i] for i in form.inputs if not isinstance(node.inputs[i], Constant)]
            if node.op in MOVE and not any(id(t) in halves for t in variables):
                candidates.add(id(node))
            else:
                halves.update(id(node.outputs[i]) for i in form.outputs)
        moved: set[int] = set()
        for node in reversed(self.graph.nodes):
            if id(node) in candidates and not any(
                id(user) in half and id(user) not in moved for t in node.outputs for user in t.outputs
            ):
                moved.add(id(node))
        return moved


def _constants(node: Node) -> list[Constant]:
    return [t for t in (*node.inputs, *_attribute_constants(node)) if isinstance(t, Constant)]


def _attribute_constants(node: Node) -> list[Constant]:
    return [value for value in node.attrs.values() if isinstance(value, Constant)]


def _mask_inputs(node: Node) -> list[Tensor]:
    """The inputs that a node puts through exp, where minus infinity and a very low number are the same."""
    position = {"Softmax": 0, "LogSoftmax": 0, "Attention": 3}.get(node.op, len(node.inputs))
    return list(node.inputs[position : position + 1])


def _weight_matrices(graph: Graph) -> Iterator[int]:
    """Ids of the tensors that depend on constants only and have two dimensions or more that are larger than 1."""
    constant: set[int] = set()
    for node in graph.nodes:
        given = [t for t in node.inputs if t.name]
        known = [t for t in given if isinstance(t, Constant) or id(t) in constant]
        if given and len(known) == len(given):
            constant.update(id(t) for t in node.outputs)
        for tensor in known:
            if sum(isinstance(size, int) and size > 1 for size in shape_of(tensor) or ()) >= 2:
                yield id(tensor)


def _called(node: Node) -> str:
    return f"{node.op} '{node.name}'"
