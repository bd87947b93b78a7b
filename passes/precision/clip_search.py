"""Where activations clip, by what their products lose: the method `search` of a `Clipping`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llmc.passes.base import Activations
from llmc.passes.graph import Graph
from llmc.passes.precision.levels import Levels
from llmc.passes.precision.rows import ExactProducts, Rows, Stack, batched, gather_rows
from llmc.passes.precision.weight_sites import WeightSite, weight_sites

Clip = tuple[str, float]
"""A method, and its percentile."""
TRIED: tuple[Clip, ...] = (
    ("minmax", 100.0),
    ("percentile", 99.999),
    ("percentile", 99.99),
    ("percentile", 99.9),
    ("percentile", 99.5),
    ("mse", 100.0),
)
"""Of clips that lose the same, the first is taken."""
ELSE: Clip = ("mse", 100.0)
"""For what no constant matrix multiplies: nothing says what it loses."""
MEMORY = 1 << 30
"""Bytes for rows of activations at one time."""


def searched(
    graph: Graph, tensors: Sequence[str], levels: Levels, activations: Activations, samples: int
) -> dict[str, float]:
    """For each tensor the magnitude to clip at with which its products, MatMul or Gemm, are nearest to the float ones.

    Errors are those of up to 512 rows of the data, chosen by their values alone, so that neither the order of the
    samples nor their batches matter; each row counts relative to the spread of its result, and what is the same in all
    rows does not count, since a bias takes it. Weights are as they are.
    """
    sites: dict[str, list[WeightSite]] = {name: [] for name in tensors}
    for _, site in weight_sites(graph):
        if isinstance(site, WeightSite) and site.activation.name in sites and _is_matrix(site):
            sites[site.activation.name].append(site)
    known = {name: found[0].depth for name, found in sites.items() if found}
    clips = {
        clip: activations.amax(graph, list(known), method=clip[0], percentile=clip[1], samples=samples)
        for clip in TRIED
        if known
    }
    chosen = dict.fromkeys(tensors, ELSE)
    for part in batched(known, MEMORY):
        for name, rows in gather_rows(activations, graph, part, samples).items():
            weight = Stack([site.view() for site in sites[name]]).thinned()
            losses = _losses(rows, weight, levels, {clip: found[name] for clip, found in clips.items()})
            chosen[name] = min(losses, key=lambda clip: losses[clip])
    amax: dict[str, float] = {}
    for method, percentile in dict.fromkeys(chosen.values()):  # asked once more: reports tell the last answer
        names = [name for name, clip in chosen.items() if clip == (method, percentile)]
        amax |= activations.amax(graph, names, method=method, percentile=percentile, samples=samples)
    return amax


def _is_matrix(site: WeightSite) -> bool:
    return site.activation_axis == -1 and len(site.weight.shape) == 2


def _losses(rows: Rows, weight: Stack, levels: Levels, clips: Mapping[Clip, float]) -> dict[Clip, float]:
    """Mean square error of rows · weightᵀ for each clip, each row relative to the spread of its result."""
    kept = np.concatenate([fold.rows for fold in rows.folds])
    exact = ExactProducts(kept, weight)

    def loss(clip: float) -> float:
        scale = levels.scales(np.array([clip], np.float32), np.dtype(np.float32))
        rounded = levels.quantize(kept, scale).astype(np.float32) * scale
        moved = rounded - kept
        return exact.mean_square(lambda part, _: moved @ part.T)

    return {clip: loss(amax) for clip, amax in clips.items()}
