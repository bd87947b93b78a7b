"""Drawn samples of a decoder, with keys and values in their caches that are its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llmc.compiler.data.samples import Samples
from llmc.compiler.data.text import is_past
from llmc.compiler.generation.decoder import as_past
from llmc.compiler.loaders import Feeds
from llmc.compiler.session import Session
from llmc.passes.graph import Array, Graph, from_structure, to_structure

TOKENS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"


def with_own_cache(samples: Samples, graph: Graph) -> Samples:
    """The same samples; in their caches, for numbers that were drawn, stands what the graph gives for earlier tokens.

    Drawn numbers are like no keys that the model makes: a pass that has calibrated on its keys would be judged on what
    never comes. The earlier tokens are the sample's own, over and over; what its mask hides of them stays hidden. A
    graph that has no growing cache, or no tokens, is given what was drawn.
    """
    pasts = [tensor for tensor in graph.inputs if is_past(tensor.name)]
    taken, given = {tensor.name for tensor in graph.inputs}, {tensor.name for tensor in graph.outputs}
    grown = set(as_past(dict.fromkeys(given)))
    if not pasts or TOKENS not in taken or any(t.name not in grown or len(t.shape or ()) != 4 for t in pasts):
        return samples
    structure = to_structure(graph)

    def make() -> Iterator[Feeds]:
        session = Session(from_structure(structure))
        for feeds in samples:
            length = feeds[pasts[0].name].shape[2]
            earlier = _earlier(feeds, [tensor.name for tensor in pasts], length)
            found = as_past(session.run(earlier)) if length else {}
            yield {**feeds, **{t.name: found[t.name].astype(t.dtype) for t in pasts if found}}

    digest = hashlib.sha256(f"{samples.digest} with caches of its own".encode()).hexdigest()
    return replace(samples, digest=digest, make=make)


def _earlier(feeds: Feeds, pasts: list[str], length: int) -> dict[str, Array]:
    """Inputs of a run over so many tokens before those of the sample, before which there is nothing."""
    ids = feeds[TOKENS]
    shape = (len(ids), length)
    made = {
        TOKENS: np.resize(ids, shape),
        MASK: np.ones(shape, feeds[MASK].dtype if MASK in feeds else np.int64),
        POSITIONS: np.broadcast_to(np.arange(length), shape).astype(
            feeds[POSITIONS].dtype if POSITIONS in feeds else np.int64
        ),
    }
    known = {name: value for name, value in made.items() if name in feeds}
    return {**feeds, **known, **{name: feeds[name][:, :, :0] for name in pasts}}
