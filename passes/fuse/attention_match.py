"""Finds scaled dot-product attention, spelled out around a Softmax, and says what it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import numpy as np

from llmc.passes.graph import Constant, Node, Tensor, constant_source, constant_value, load_values
from llmc.passes.match import attribute, called
from llmc.passes.shapes.dimension import ONE
from llmc.passes.shapes.dimensions import Dimensions

CONVERSIONS = ("Cast", "Identity")
MASKED = -1e4
"""What is added to a score, or stands for it, from here on down leaves it no weight: exp(-1e4) is 0 in float32."""
REACH = 8
"""Nodes between a product of queries and keys and its Softmax, at most."""
READ_UP_TO = 1 << 24
"""Elements of constant masks that are looked at one by one."""


class NotAttentionError(Exception):
    """The first thing that stops a Softmax from being attention."""


@dataclass(frozen=True)
class Mask:
    """Where attention must not go: `tensor` is added to scores, or says which of them `fill` stands for."""

    tensor: Tensor
    kind: Literal["add", "keep", "drop"]
    """'keep': a true element leaves the score; 'drop': a true element puts `fill` there."""
    fill: float = 0.0
    factor: float = 1.0
    """What the masked scores are multiplied with, positive and at most 1: what is added counts so much less."""


@dataclass
class Site:
    """One attention: softmax(query · keyᵀ · scale + masks) · value, with all that computes it."""

    softmax: Node
    product: Node
    """The MatMul with the values, whose result the attention makes."""
    query: Tensor
    key: Tensor
    """Transposed by `key_order` it is [batch, heads, keys, size] (or without heads)."""
    value: Tensor
    scale: float
    key_order: list[int] | None = None
    masks: list[Mask] = field(default_factory=list)
    softcap: float = 0.0
    """c where scores become c · tanh(scores / c) before they are masked; 0 where they do not."""
    guarded: bool = False
    """Whether a row that is masked everywhere, NaN after the Softmax, is made 0."""


class AttentionMatcher:
    """Looks at a Softmax and around it. `given_back` are the ids of all graphs' outputs."""

    def __init__(self, dims: Dimensions, given_back: set[int], opset: int) -> None:
        self.dims, self.given_back, self.opset = dims, given_back, opset

    def at(self, softmax: Node) -> Site:
        """The attention around a Softmax. Raises NotAttentionError."""
        shape = self.dims.of(softmax.inputs[0])
        if shape is None or len(shape) not in (3, 4):
            raise NotAttentionError(
                "its rank is not known" if shape is None else f"it has rank {len(shape)}, not 3 or 4"
            )
        axis = softmax.attrs.get("axis", -1 if self.opset >= 13 else 1)
        if axis % len(shape) != len(shape) - 1:
            raise NotAttentionError(f"it is over axis {axis}, not the last one")
        product, guarded, masked = self._to_values(softmax)
        scores, scale, softcap, masks = self._to_scores(softmax)
        if masked is not None:
            if [id(unconverted(mask.tensor)) for mask in masks if mask.kind == "add"] != [id(unconverted(masked))]:
                raise NotAttentionError(f"rows are made 0 by '{masked.name}', which is not the mask")
            guarded = True
        query, query_scale = unscaled(scores.inputs[0])
        key, key_order, key_scale = self._key(scores.inputs[1])
        site = Site(softmax, product, query, key, product.inputs[1], scale * query_scale * key_scale)
        site.key_order, site.masks, site.guarded = key_order, masks, guarded
        if softcap:
            site.softcap, site.scale = softcap, site.scale * softcap
        return site

    def only_user(self, tensor: Tensor) -> Node:
        """The one node that reads a tensor inside the pattern."""
        if id(tensor) in self.given_back:
            raise NotAttentionError(f"'{tensor.name}', inside the pattern, is an output of the graph")
        users = users_of(tensor)
        if len(users) != 1:
            others = ", ".join(called(user) for user in users)
            raise NotAttentionError(f"'{tensor.name}', inside the pattern, is used by {others or 'nothing'}")
        return users[0]

    def _to_values(self, softmax: Node) -> tuple[Node, bool, Tensor | None]:
        """From the weights down to the product with the values; whether NaN is made 0 on the way, or rows of a mask."""
        tensor, guarded, masked = softmax.outputs[0], False, None
        while True:
            guard = self._guard(tensor)
            if guard is not None:
                tensor, guarded = guard.outputs[0], True
                continue
            user = self.only_user(tensor)
            if user.op == "MatMul" and user.inputs[0] is tensor and user.inputs[1] is not tensor:
                return user, guarded, masked
            rows = _masked_rows(user, tensor)
            if rows is None and _chooses_all(user, tensor):
                tensor = user.outputs[0]
                continue
            if rows is not None:
                tensor, masked = user.outputs[0], rows
                continue
            if user.op not in CONVERSIONS or user.outputs[0].dtype is None or user.outputs[0].dtype.kind not in "fV":
                raise NotAttentionError(
                    f"the result of {called(softmax)} goes to {called(user)}, where MatMul is needed"
                )
            tensor = user.outputs[0]

    def _guard(self, weights: Tensor) -> Node | None:
        """`Where(IsNaN(weights), 0, weights)`."""
        users = users_of(weights)
        test = next((user for user in users if user.op == "IsNaN"), None)
        if test is None or len(users) != 2 or id(weights) in self.given_back:
            return None
        guard = self.only_user(test.outputs[0])
        whole = guard.op == "Where" and guard.inputs[0] is test.outputs[0] and guard.inputs[2] is weights
        return guard if whole and single(guard.inputs[1]) == 0 else None

    def _to_scores(self, softmax: Node) -> tuple[Node, float, float, list[Mask]]:
        """From the Softmax up to the product of queries and keys: that node, its scale, its cap, and the masks."""
        tensor, scale, softcap = softmax.inputs[0], 1.0, 0.0
        masks: list[Mask] = []
        while True:
            self.only_user(tensor)
            node = producer(tensor)
            if node is None or node.domain:
                raise NotAttentionError(f"'{tensor.name}' is no product of queries and keys")
            if node.op == "MatMul":
                return node, scale, softcap, masks
            if node.op == "Tanh" and not softcap and scale > 0:
                tensor, scale, softcap = node.inputs[0], 1.0, scale
                continue
            if node.op in CONVERSIONS:
                tensor = node.inputs[0]
                continue
            factor = scale_of(node)
            if factor is not None:
                tensor, scale = factor[0], scale * factor[1]
                continue
            if node.op in ("Add", "Sub", "Where") and not 0 < scale <= 1:
                raise NotAttentionError(f"the scale of {scale:.6g} comes after the mask of {called(node)}")
            tensor, mask = self._unmasked(node, scale)
            if softcap:
                raise NotAttentionError(f"its scores are masked by {called(node)} before they are capped")
            masks.append(mask)

    def _unmasked(self, node: Node, scale: float) -> tuple[Tensor, Mask]:
        """The scores before a mask was applied, and the mask, where both are scaled afterwards."""
        if node.op == "Add":
            for scores, mask in (node.inputs, node.inputs[::-1]):
                if leads_to_product(scores):
                    return scores, Mask(mask, "add", factor=scale)
        if node.op == "Where":
            condition, chosen, otherwise = node.inputs
            for scores, other, kind in ((chosen, otherwise, "keep"), (otherwise, chosen, "drop")):
                fill = single(other)
                if fill is not None and leads_to_product(scores):
                    return scores, Mask(condition, kind, fill * scale)  # type: ignore[arg-type]
        raise NotAttentionError(f"the scores come from {called(node)}, where MatMul, a scale or a mask is needed")

    def _key(self, tensor: Tensor) -> tuple[Tensor, list[int] | None, float]:
        """The keys behind their transposition, the order of axes that makes them [..., keys, size], their scale."""
        tensor, outer = unscaled(tensor)
        shape = self.dims.of(tensor)
        if shape is None:
            raise NotAttentionError(f"the rank of the keys '{tensor.name}' is not known")
        node = producer(tensor)
        source = self._transposed_in_batches(node)
        order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        if source is None and node is not None and node.op == "Transpose":
            source = node.inputs[0]
            given = node.attrs.get("perm") or list(range(len(shape)))[::-1]
            order = [given[axis] for axis in order]
        elif source is not None:
            order = list(range(len(shape)))
        if source is None:
            return tensor, order, outer
        key, inner = unscaled(source)
        return key, order if order != sorted(order) else None, outer * inner

    def _transposed_in_batches(self, node: Node | None) -> Tensor | None:
        """x of `Reshape(Transpose(Reshape(x, [-1, m, n]), [0, 2, 1]), [..., n, m])`, which swaps its last two axes."""
        if node is None or node.op != "Reshape":
            return None
        swap = producer(node.inputs[0])
        if swap is None or swap.op != "Transpose" or swap.attrs.get("perm") != [0, 2, 1]:
            return None
        merge = producer(swap.inputs[0])
        if merge is None or merge.op != "Reshape":
            return None
        before, merged, after = (self.dims.of(t) for t in (merge.inputs[0], merge.outputs[0], node.outputs[0]))
        if before is None or merged is None or after is None or len(before) != len(after) or len(before) < 3:
            return None
        swapped = (*before[:-2], before[-1], before[-2])
        return merge.inputs[0] if merged[1:] == before[-2:] and after == swapped else None


def _masked_rows(node: Node, weights: Tensor) -> Tensor | None:
    """x of `Where(Equal(ReduceMax(x, -1), -inf), 0, weights)`, which makes rows 0 that x masks everywhere."""
    if node.op != "Where" or node.inputs[2] is not weights or single(unconverted(node.inputs[1])) != 0:
        return None
    test = producer(node.inputs[0])
    if test is None or test.op != "Equal" or single(unconverted(test.inputs[1])) != -np.inf:
        return None
    largest = producer(test.inputs[0])
    whole = largest is not None and largest.op == "ReduceMax" and attribute(largest, "axes") == [-1]
    return largest.inputs[0] if largest is not None and whole and largest.attrs.get("keepdims", 1) else None


def _chooses_all(node: Node, weights: Tensor) -> bool:
    """Whether a node is `Where(false, …, weights)`, whose condition is a constant."""
    if node.op != "Where" or node.inputs[2] is not weights or not isinstance(node.inputs[0], Constant):
        return False
    return prod(node.inputs[0].shape) <= READ_UP_TO and not np.any(load_values(node.inputs[0]))


def unconverted(tensor: Tensor) -> Tensor:
    """The tensor before it was given another type, or another name."""
    while (node := producer(tensor)) is not None and node.op in (*CONVERSIONS, "CastLike"):
        tensor = node.inputs[0]
    return tensor


def producer(tensor: Tensor) -> Node | None:
    """The node that makes a tensor."""
    return tensor.inputs[0] if tensor.inputs else None


def users_of(tensor: Tensor) -> list[Node]:
    """The nodes that read the values of a tensor, each once: CastLike reads the type of its second input alone."""
    users = {id(user): user for user in tensor.outputs if user.op != "CastLike" or user.inputs[0] is tensor}
    return list(users.values())


def single(tensor: Tensor) -> float | None:
    """The value of a constant with one element."""
    source = constant_source(tensor)
    if source is None or prod(source.shape) != 1:
        return None
    value = constant_value(tensor)
    return None if value is None or value.dtype.kind not in "fiV" else float(value.astype(np.float64).reshape(-1)[0])


def scale_of(node: Node | None) -> tuple[Tensor, float] | None:
    """x and c of a node that computes x · c with one number c."""
    if node is None or node.op not in ("Mul", "Div") or node.domain:
        return None
    left, right = node.inputs
    factor = single(right)
    if factor is not None and constant_source(left) is None:
        return (left, factor) if node.op == "Mul" else ((left, 1.0 / factor) if factor else None)
    factor = single(left)
    return (right, factor) if node.op == "Mul" and factor is not None and constant_source(right) is None else None


def scale_attribute(scale: float, size: int | None) -> float | None:
    """Attention's attribute `scale` for heads of this size; None where it is the default, 1/√size."""
    return None if size and abs(scale * size**0.5 - 1) < 1e-6 else scale


def unscaled(tensor: Tensor) -> tuple[Tensor, float]:
    """What a tensor was before it was multiplied with numbers, and their product."""
    scale = 1.0
    while (found := scale_of(producer(tensor))) is not None:
        tensor, scale = found[0], scale * found[1]
    return tensor, scale


def leads_to_product(tensor: Tensor, reach: int = REACH) -> bool:
    """Whether a tensor is a product of two computed tensors, but for scales, masks and conversions."""
    node = producer(tensor)
    if node is None or reach == 0:
        return False
    if node.op == "MatMul":
        return all(constant_source(t) is None for t in node.inputs)
    passing = {
        "Add": (0, 1),
        "Where": (1, 2),
        "Mul": (0, 1),
        "Div": (0,),
        "Tanh": (0,),
        **dict.fromkeys(CONVERSIONS, (0,)),
    }
    return any(leads_to_product(node.inputs[i], reach - 1) for i in passing.get(node.op, ()))


def counts_along(dims: Dimensions, tensor: Tensor, axis: int) -> bool:
    """Whether a tensor is 0, 1, 2 … along `axis`, counted from the end, and has one element along every other."""
    shape = dims.of(tensor)
    if shape is None or len(shape) < -axis or any(n != ONE for i, n in enumerate(shape, -len(shape)) if i != axis):
        return False
    node = producer(tensor)
    while node is not None and node.op in ("Unsqueeze", "Reshape", "Cast", "Identity", "Squeeze"):
        tensor = node.inputs[0]
        node = producer(tensor)
    if node is None or node.op != "Range":
        value = constant_value(tensor) if node is None and shape[axis].number is not None else None
        return value is not None and bool(np.array_equal(value.reshape(-1), np.arange(value.size)))
    return single(node.inputs[0]) == 0 and single(node.inputs[2]) == 1


def is_causal(dims: Dimensions, tensor: Tensor, keeps: bool = True) -> bool:
    """Whether a boolean tensor [..., queries, keys] is `keeps` just where the key does not come after the query."""
    node = producer(tensor)
    if node is None:
        value = constant_value(tensor) if isinstance(tensor, Constant) and prod(tensor.shape) <= READ_UP_TO else None
        if value is None or value.ndim < 2 or value.dtype != np.bool_:
            return False
        return bool(np.all((value == keeps) == np.tri(*value.shape[-2:], dtype=np.bool_)))
    if node.op == "Not":
        return is_causal(dims, node.inputs[0], not keeps)
    if node.op in CONVERSIONS:
        return is_causal(dims, node.inputs[0], keeps)
    first_is_key = {("LessOrEqual", True): True, ("GreaterOrEqual", True): False}
    first_is_key |= {("Greater", False): True, ("Less", False): False}
    if (node.op, keeps) in first_is_key:
        keys, queries = node.inputs if first_is_key[node.op, keeps] else node.inputs[::-1]
        return counts_along(dims, keys, -1) and counts_along(dims, queries, -2)
    if node.op == "Trilu" and bool(attribute(node, "upper", 1)) != keeps:
        offset = single(node.inputs[1]) if len(node.inputs) > 1 and not node.inputs[1].is_empty() else 0
        return offset == int(not keeps) and _is_true_everywhere(node.inputs[0])
    return False


def _is_true_everywhere(tensor: Tensor) -> bool:
    for _ in range(REACH):
        value = constant_value(tensor) if constant_source(tensor) is not None else None
        node = producer(tensor)
        if value is not None:
            return bool(np.all(value == 1))
        if node is not None and node.op == "ConstantOfShape":
            filled = node.attrs.get("value")
            return filled is not None and bool(np.all(filled.values == 1))
        if node is None or node.op not in (*CONVERSIONS, "Expand", "Reshape"):
            return False
        tensor = node.inputs[0]
    return False


def constants_behind(tensor: Tensor, limit: int = 200) -> Iterator[Tensor]:
    """The graph inputs and constants that a tensor is computed from; `limit` nodes of them at most."""
    pending, seen = [tensor], set[int]()
    while pending and len(seen) < limit:
        tensor = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        node = producer(tensor)
        if node is None:
            yield tensor
        else:
            pending.extend(t for t in node.inputs if not t.is_empty())
