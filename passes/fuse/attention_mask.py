"""Turns what masks the scores of an attention into what the operator Attention takes: a tensor, or `is_causal`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np

from llmc.passes.fuse.attention_match import (
    MASKED,
    READ_UP_TO,
    Mask,
    NotAttentionError,
    Site,
    constants_behind,
    is_causal,
    producer,
    single,
)
from llmc.passes.graph import Array, Constant, Graph, Tensor, constant_source, constant_value, load_values
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.shapes.dimension import ONE, Shape
from llmc.passes.shapes.dimensions import Dimensions
from llmc.passes.shapes.shape_vectors import shape_vector

MOVES = {"Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
HALVED = 0.5
"""ONNX Runtime takes a score of exactly the lowest finite number for masked and makes the row 0, where ONNX says that
it is like any other; half of it leaves a score no weight either."""


@dataclass(frozen=True)
class Masked:
    """Inputs of an Attention node: a mask or None, and its attribute `is_causal`."""

    mask: Tensor | None
    causal: bool


@dataclass(frozen=True)
class _Meaning:
    """What a mask comes down to: a boolean to hand on, a tensor to add, a boolean that chooses what to add, or none."""

    kind: Literal["causal", "boolean", "add", "choose"]
    tensor: Tensor
    drops: bool = False
    """Whether true elements of a boolean are those to be masked."""
    factor: float = 1.0
    """What a tensor to add is multiplied with."""


class MaskBuilder:
    """Makes the masks of one scope's attentions; layers that share a mask share what is made from it."""

    def __init__(
        self, graph: Graph, dims: Dimensions, placement: Placement, fresh: Callable[[str], str], zero_masked_rows: bool
    ) -> None:
        self.graph, self.dims, self.placement, self.fresh = graph, dims, placement, fresh
        self.zero_masked_rows = zero_masked_rows
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def check(self, site: Site, scores: Shape) -> None:
        """Raise NotAttentionError where there is no mask to be made; changes nothing."""
        meanings = [self._meaning(mask, site, scores) for mask in site.masks]
        if {m.kind for m in meanings} >= {"boolean", "add"} or {m.kind for m in meanings} >= {"boolean", "choose"}:
            raise NotAttentionError("it has a boolean mask beside an additive one")
        for meaning in meanings:
            if meaning.kind == "add" and meaning.tensor.dtype != site.query.dtype:
                added, queries = meaning.tensor.dtype, site.query.dtype
                raise NotAttentionError(f"the mask '{meaning.tensor.name}' is {added}, the queries are {queries}")
            if meaning.kind != "causal":
                self._check_shape(meaning.tensor, scores)

    def make(self, site: Site, scores: Shape) -> Masked:
        """The mask for a site whose scores have the shape [batch, heads, queries, keys], or without heads."""
        meanings = [self._meaning(mask, site, scores) for mask in site.masks]
        tensors = [self._tensor(meaning, site.query.dtype) for meaning in meanings if meaning.kind != "causal"]
        causal = len(tensors) < len(meanings)
        if not tensors:
            return Masked(None, causal)
        whole = tensors[0]
        for other in tensors[1:]:
            join = "And" if whole.dtype == np.bool_ else "Add"
            key = (join, id(whole), id(other))
            whole = self._shared(key, whole, partial(_joined_masks, join, other))
        return Masked(self._fitted(whole, site, scores), causal)

    def _meaning(self, mask: Mask, site: Site, scores: Shape) -> _Meaning:
        if mask.kind == "add" and mask.factor != 1.0:
            if self._may_be_infinite(mask.tensor):
                self._may_be_zeroed(mask.tensor, site)
            return _Meaning("add", mask.tensor, factor=mask.factor)
        if mask.kind == "add":
            return self._meaning_of_sum(mask.tensor, site, scores)
        if mask.fill > MASKED:
            raise NotAttentionError(f"{mask.fill:.6g} stands for masked scores: that leaves them some weight")
        shape, drops = self.dims.of(mask.tensor), mask.kind == "drop"
        if shape is not None and shape[-2:] == scores[-2:] and is_causal(self.dims, mask.tensor, not drops):
            return _Meaning("causal", mask.tensor)
        if np.isinf(mask.fill):
            self._may_be_zeroed(mask.tensor, site)
            return _Meaning("boolean", mask.tensor, drops)
        return _Meaning("choose", mask.tensor, drops)

    def _meaning_of_sum(self, tensor: Tensor, site: Site, scores: Shape) -> _Meaning:
        """What it comes down to that `tensor` is added to the scores."""
        node = producer(tensor)
        if node is not None and node.op == "Where":
            chosen, otherwise = single(node.inputs[1]), single(node.inputs[2])
            fill = otherwise if chosen == 0 else chosen if otherwise == 0 else None
            if fill is not None and fill <= MASKED:
                found = self._meaning(Mask(node.inputs[0], "keep" if chosen == 0 else "drop", fill), site, scores)
                stays = found.kind == "choose" and fill > _lowest(tensor.dtype) and tensor.dtype == site.query.dtype
                return _Meaning("add", tensor) if stays else found
        if constant_source(tensor) is not None and prod(tensor.shape) <= READ_UP_TO:
            value, shape = constant_value(tensor), self.dims.of(tensor)
            if value is not None and shape is not None and shape[-2:] == scores[-2:] and _is_causal_bias(value):
                return _Meaning("causal", tensor)
        if self._may_be_infinite(tensor):
            self._may_be_zeroed(tensor, site)
        return _Meaning("add", tensor)

    def _may_be_zeroed(self, tensor: Tensor, site: Site) -> None:
        if not site.guarded and not self.zero_masked_rows:
            raise NotAttentionError(
                f"'{tensor.name}' masks with -inf: a row masked everywhere is NaN here and 0 in Attention; "
                "`zero_masked_rows` allows that"
            )

    def _may_be_infinite(self, tensor: Tensor) -> bool:
        """Whether a row of an additive mask may be -inf all along."""
        if constant_source(tensor) is not None and prod(tensor.shape) <= READ_UP_TO:
            value = constant_value(tensor)
            return value is None or bool(np.isneginf(value.astype(np.float32)).all(axis=-1).any())
        moved = tensor
        while (node := producer(moved)) is not None and node.op in MOVES:
            moved = node.inputs[0]
        if producer(moved) is None and not isinstance(moved, Constant):
            return True
        return any(_holds(source, -np.inf) for source in constants_behind(tensor))

    def _tensor(self, meaning: _Meaning, dtype: Any) -> Tensor:
        """The mask that Attention takes: true for what is kept, or added to the scores."""
        tensor, drops = meaning.tensor, meaning.drops
        if meaning.kind == "boolean":
            return self._shared(("Not", id(tensor)), tensor, lambda op, t: op.Not(t)) if drops else tensor
        if meaning.factor != 1.0:
            scale = np.asarray(meaning.factor, dtype)
            return self._shared(("Mul", id(tensor), meaning.factor), tensor, lambda op, t: op.Mul(t, scale))
        zero, lowest = np.zeros((), dtype), np.asarray(_lowest(dtype) * HALVED, dtype)
        if meaning.kind == "add" and any(_holds(source, _lowest(dtype)) for source in constants_behind(tensor)):
            full = np.asarray(_lowest(dtype), dtype)
            return self._shared(("halved", id(tensor)), tensor, partial(_halved, full, lowest))
        if meaning.kind == "add":
            return tensor
        values = (lowest, zero) if drops else (zero, lowest)
        key = ("Where", id(tensor), drops, str(dtype))
        return self._shared(key, tensor, lambda op, t: op.Where(t, *values), dtype)

    def _check_shape(self, mask: Tensor, scores: Shape) -> None:
        shape = self.dims.of(mask)
        if shape is None or len(shape) > len(scores):
            raise NotAttentionError(f"the rank of the mask '{mask.name}' is not known, or more than that of the scores")
        # The last axis is 1 or as long as the values are many, whatever it is called, or the graph could not run.
        for size, wanted in zip(shape[-2::-1], scores[-2::-1], strict=False):
            if size not in (ONE, wanted):
                raise NotAttentionError(f"the mask '{mask.name}' {_text(shape)} may not broadcast to {_text(scores)}")

    def _fitted(self, mask: Tensor, site: Site, scores: Shape) -> Tensor:
        """The mask with as many rows and columns as the scores, which ONNX Runtime wants, and room for heads."""
        shape = self.dims.of(mask) or ()
        if len(scores) == 3 and len(shape) == 3:
            mask = self._shared(("Unsqueeze", id(mask)), mask, lambda op, t: op.Unsqueeze(t, axes=[1]))
            shape = (shape[0], ONE, *shape[1:])
        wanted = scores[-2:]
        if shape[-2:] == wanted:
            return mask
        target = (*(ONE,) * max(len(shape) - 2, 0), *wanted)
        key = ("Expand", id(mask), target)
        near = (site.query, site.value)
        return self._shared(
            key, mask, lambda op, t: op.Expand(t, shape_vector(op, self.graph, self.dims, target, near))
        )

    def _shared(
        self, key: tuple[Any, ...], tensor: Tensor, make: Callable[[Any, Tensor], Tensor], dtype: Any = None
    ) -> Tensor:
        """What `make` makes of a tensor, once for each key."""
        if key not in self._made:
            op = Builder(self.graph.opset, self.fresh, tensor.name)
            made = make(op, tensor)
            made.dtype = dtype or tensor.dtype
            self.dims.follow(op.nodes)
            self.placement.early(op.nodes)
            self._made[key] = made
        return self._made[key]


def _joined_masks(join: str, other: Tensor, op: Any, tensor: Tensor) -> Tensor:
    return cast(Tensor, getattr(op, join)(tensor, other))


def _is_causal_bias(value: np.ndarray[Any, Any]) -> bool:
    lower = np.broadcast_to(np.tri(*value.shape[-2:], dtype=np.bool_), value.shape)
    return bool(np.all(value[lower] == 0) and np.all(value[~lower] <= MASKED))


def _halved(full: Array, half: Array, op: Any, tensor: Tensor) -> Tensor:
    """Numbers to add of which none is the lowest one."""
    test = op.Equal(tensor, full)
    test.dtype = np.dtype(np.bool_)
    return cast(Tensor, op.Where(test, half, tensor))


def _holds(source: Tensor, number: float) -> bool:
    """Whether a small floating-point constant has this number among its values, or a finite one's opposite."""
    if not isinstance(source, Constant) or source.dtype.kind not in "fV" or prod(source.shape) > 1 << 12:
        return False
    return bool(
        np.isin(load_values(source).astype(np.float64), [number, -number if np.isfinite(number) else number]).any()
    )


def _lowest(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).min)  # type: ignore[no-untyped-call]


def _text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
