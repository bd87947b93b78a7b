"""The pass `decompose-attention`."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from llmc.passes.base import Context, NearMiss, PassResult, Safety, Skip
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
    unlink,
)
from llmc.passes.precision.selection import SelectivePass

SOFTMAX_SINCE = 13
"""The opset from which Softmax works along one axis."""


class DecomposeAttention(SelectivePass):
    """Spells Attention out as two products and a softmax, for passes that treat the products one by one.

    Attention(q, k, v, mask), q, k, v [B, S, heads · size] or [B, heads, S, size] → MatMul(Softmax(MatMul(q · scale, kᵀ)
    + mask), v) in the same type; where a mask of booleans is false, the lowest number of the type stands for the score.
    Stands before quantize-int8 with `attention: true`: integers need the softmax's result as a tensor.

    **Safety:** tolerance: sums in another order. A row that the mask leaves nothing of averages all values, where
    Attention gives NaN.

    Source: ONNX operator specification, Attention-23.
    """

    safety: ClassVar[Safety] = "tolerance"

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises LlmcError for a pattern that matches nothing."""
        nodes = [node for node in graph.nodes if node.op == "Attention" and node.domain in (None, "", "ai.onnx")]
        if not nodes:
            raise Skip("the graph has no Attention")
        context.infer_shapes(graph)
        result = PassResult()
        refusals = self.refusals(nodes)
        instead: dict[int, list[Node]] = {}
        writer = _Writer(graph)
        for node in nodes:
            reason = refusals.get(id(node)) or _unfit(node)
            if reason is not None:
                result.near_misses.append(NearMiss("DecomposeAttention", node.name, reason, module_of(node)))
            elif context.apply(result, "DecomposeAttention", node):
                instead[id(node)] = writer.spell_out(node)
        graph.nodes = [new for node in graph.nodes for new in instead.get(id(node), [node])]
        return result


def _unfit(node: Node) -> str | None:
    given = [tensor for tensor in node.inputs[4:] if not tensor.is_empty()]
    if given:
        return f"it has '{given[0].name}' beside its mask: a cache, or lengths"
    if len([tensor for tensor in node.outputs if not tensor.is_empty()]) > 1:
        return "more than its first output is used"
    for name in ("is_causal", "softcap", "qk_matmul_output_mode"):
        if node.attrs.get(name, 0):
            return f"its {name} is {node.attrs[name]}"
    dtypes = {np.dtype(tensor.dtype) if tensor.dtype is not None else None for tensor in node.inputs[:3]}
    if len(dtypes) != 1 or dtypes & {None} or dtypes.copy().pop().kind != "f":  # type: ignore[union-attr]
        return "its inputs are of different or unknown types"
    ranks = [len(tensor.shape) if tensor.shape is not None else None for tensor in node.inputs[:3]]
    if ranks not in ([3] * 3, [4] * 3):
        return "its inputs have different or unknown ranks"
    heads = _heads(node)
    if None in heads or heads[0] != heads[1]:
        return "its heads share keys and values, or their number is not known"
    return None if _size(node) else "the size of its heads is not known"


def _heads(node: Node) -> list[int | None]:
    """Of queries, and of keys and values."""
    if len(node.inputs[0].shape or ()) == 3:
        return [node.attrs.get(name) for name in ("q_num_heads", "kv_num_heads")]
    sizes = [list(tensor.shape or [None, None])[1] for tensor in node.inputs[:2]]
    return [size if isinstance(size, int) else None for size in sizes]


def _size(node: Node) -> int | None:
    """Of one head of the queries."""
    shape = list(node.inputs[0].shape or [None])
    width = shape[-1]
    if not isinstance(width, int):
        return None
    heads = _heads(node)[0]
    return width if len(shape) == 4 or not heads else width // heads


class _Writer:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.fresh = graph, fresh_names(graph)
        self.user: Node
        self.made: list[Node]

    def spell_out(self, node: Node) -> list[Node]:
        """The nodes that stand for `node`; the last one takes over its result."""
        self.user, self.made = node, []
        q, k, v = node.inputs[:3]
        mask = node.inputs[3] if len(node.inputs) > 3 and not node.inputs[3].is_empty() else None
        dtype, flat = np.dtype(q.dtype), len(q.shape or ()) == 3
        heads, size = _heads(node)[0] or 0, _size(node) or 1
        scale = node.attrs.get("scale") or 1 / math.sqrt(size)
        if flat:
            split = np.array([0, 0, heads, -1])
            q, v = (self._do("Transpose", self._do("Reshape", x, split), perm=[0, 2, 1, 3]) for x in (q, v))
            k = self._do("Transpose", self._do("Reshape", k, split), perm=[0, 2, 3, 1])
        else:
            k = self._do("Transpose", k, perm=[0, 1, 3, 2])
        scores = self._do("MatMul", self._do("Mul", q, np.asarray(scale, dtype)), k)
        if mask is not None:
            boolean = mask.dtype is not None and np.dtype(mask.dtype) == np.bool_
            low = np.asarray(np.finfo(dtype).min, dtype)
            scores = self._do("Where", mask, scores, low) if boolean else self._do("Add", scores, mask)
        product = self._do("MatMul", self._do("Softmax", scores, axis=-1), v)
        if flat:
            product = self._do("Reshape", self._do("Transpose", product, perm=[0, 2, 1, 3]), np.array([0, 0, -1]))
        result, last = node.outputs[0], self.made[-1]
        unlink(node)
        last.outputs[0] = result
        return self.made

    def _do(self, op: str, *inputs: Tensor | Array, **attributes: object) -> Variable:
        name = self.user.outputs[0].name
        tensors = [
            Constant(self.fresh(f"{name}_constant"), value) if isinstance(value, np.ndarray) else value
            for value in inputs
        ]
        data = next(t for t in tensors[1 if op == "Where" else 0 :] if t.dtype is not None)
        made = Variable(self.fresh(f"{name}_{op.lower()}"), data.dtype)
        node = Node(op, self.fresh(f"{self.user.name}/{op}"), attributes, tensors, [made])
        metadata(node).update(metadata(self.user))
        self.made.append(node)
        return made
