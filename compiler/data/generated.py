"""Samples that are drawn, in the shapes of a graph's inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from llmc.compiler.data.bounds import index_bounds
from llmc.compiler.data.samples import Samples, Sizes, graph_inputs
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Feeds
from llmc.compiler.recipe.errors import suggestion
from llmc.passes.graph import Array, Graph, Tensor, shape_of
from llmc.passes.shapes.dimension import size_at, summands

Ranges = Mapping[str, tuple[float, float]]
"""Input → least and largest value."""


def generate(
    graph: Graph,
    sizes: Sequence[Sizes],
    *,
    vocabulary: int | None = None,
    seed: int = 0,
    count: int = 16,
    ranges: Ranges = MappingProxyType({}),
) -> Samples:
    """`count` random samples in the shapes of the graph's inputs, going through `sizes` in turn.

    What a value may be is read off the graph (the rows of the table that an input indexes) and the input's
    name: token ids below `vocabulary`, masks of ones that end in padding (not all of them), positions in order;
    floats are normal. `ranges` gives an input's least and largest value instead. The same arguments give the same
    samples. Raises LlmcError for a range of an input that is not there.
    """
    bounds = index_bounds(graph)
    if vocabulary is not None:
        bounds["input_ids"] = min(vocabulary, bounds.get("input_ids", vocabulary))
    inputs = graph_inputs(graph)
    for given in sizes:
        _check_sizes(inputs, given)
    strange = next((name for name in ranges if name not in {tensor.name for tensor in inputs}), None)
    if strange is not None:
        raise LlmcError(
            f"verify.ranges: the model has no input '{strange}'{suggestion(strange, [t.name for t in inputs])}"
        )
    described = [(t.name, str(t.dtype), shape_of(t), bounds.get(t.name)) for t in inputs]
    recipe = repr((described, [sorted(given.items()) for given in sizes], seed, count, sorted(ranges.items())))

    def make(number: int) -> Feeds:
        return random_feeds(inputs, sizes[number % len(sizes)], bounds, np.random.default_rng([seed, number]), ranges)

    return Samples(
        "random inputs", hashlib.sha256(recipe.encode()).hexdigest(), True, count, lambda: map(make, range(count))
    )


def random_feeds(
    inputs: Sequence[Tensor],
    sizes: Sizes,
    bounds: Mapping[str, int],
    rng: np.random.Generator,
    ranges: Ranges = MappingProxyType({}),
) -> dict[str, Array]:
    """One random sample; integers of an input stay below its entry in `bounds`, or within that in `ranges`."""
    feeds = {}
    for tensor in inputs:
        shape = tuple(size_at(size, sizes) for size in tensor.shape)
        dtype = np.dtype(tensor.dtype)
        if tensor.name in ranges:
            feeds[tensor.name] = _within(ranges[tensor.name], dtype, shape, rng)
        else:
            feeds[tensor.name] = _random(tensor.name, dtype, shape, bounds.get(tensor.name), rng)
    _pad_past(feeds)
    return feeds


def _within(
    limits: tuple[float, float], dtype: np.dtype[Any], shape: tuple[int, ...], rng: np.random.Generator
) -> Array:
    """Uniform from the least to the largest value, of integers both included."""
    if dtype.kind in "iub":
        return rng.integers(int(limits[0]), int(limits[1]) + 1, size=shape).astype(dtype)
    return rng.uniform(*limits, size=shape).astype(dtype)


def _pad_past(feeds: dict[str, Array]) -> None:
    """Where a mask is longer than the tokens, it covers a cache before them, which is padded on the left.

    The mask is turned round, so that no new token is hidden, and positions go on from it.
    """
    mask, tokens = feeds.get("attention_mask"), feeds.get("input_ids")
    if mask is None or tokens is None or mask.ndim != 2 or mask.shape[1] <= tokens.shape[1]:
        return
    mask[:] = mask[:, ::-1].copy()
    mask[:, -tokens.shape[1] :] = 1
    if "position_ids" in feeds:
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -tokens.shape[1] :]
        feeds["position_ids"] = positions.astype(feeds["position_ids"].dtype)


def _random(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], bound: int | None, rng: np.random.Generator
) -> Array:
    if "mask" in name:
        return _mask(shape, rng).astype(dtype)
    if dtype.kind not in "iub":
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    return rng.integers(0, bound or (256 if dtype == np.uint8 else 2), size=shape).astype(dtype)


def _mask(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Ones; of a [rows, length] mask, rows after the first end in zeros, over half the length at most.

    A row that is alone does so in every other sample.
    """
    mask = np.ones(shape, dtype=np.int64)
    if len(shape) == 2:
        rows, length = shape
        kept = rng.integers((length + 1) // 2, length + 1, size=rows)
        if rows > 1 or rng.integers(2):
            kept[0] = length
        mask[np.arange(length) >= kept[:, None]] = 0
    return mask


def _check_sizes(inputs: Sequence[Tensor], sizes: Sizes) -> None:
    for tensor in inputs:
        shape = shape_of(tensor)
        if shape is None or tensor.dtype is None or np.dtype(tensor.dtype).kind not in "iubfV":
            raise LlmcError(f"random values cannot be made for input '{tensor.name}': give data with --calibration")
        for axis, size in enumerate(shape):
            if size is None:
                raise LlmcError(f"no size is given for dimension {axis} of input '{tensor.name}'")
            for name in [] if isinstance(size, int) else summands(size):
                if name not in sizes and not name.isdecimal():
                    raise LlmcError(f"no size is given for dimension '{name}' of input '{tensor.name}'")
