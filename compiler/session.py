"""Runs a Graph in ONNX Runtime with every optimization off: the truth that verification and calibration stand on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from llmc.compiler.blocks import Blocks, blocks_of
from llmc.compiler.half import has_halves, round_halves
from llmc.compiler.integers import has_signed_products, with_unsigned_products
from llmc.compiler.narrow import has_narrow, spell_out
from llmc.compiler.runner import Runner
from llmc.passes.cache.int8_cache import Int8Cache
from llmc.passes.cache.static_cache import StaticCache
from llmc.passes.graph import Array, Graph, numpy_dtype, onnx_dtype, to_structure

_Back = Callable[[dict[str, Array]], dict[str, Array]]


class Session:
    """One graph, ready to run on the CPU. Weights are read where they are, not copied.

    float16 and bfloat16 round after every operator, as on a GPU (see `compiler/half.py`); types that ONNX Runtime lacks
    are spelled out (see `compiler/narrow.py`), and products of int8 are exact (see `compiler/integers.py`). A graph
    with a static cache takes inputs, and gives outputs, of its growing form as well (see
    `passes/cache/static_cache.py`), one with int8 caches likewise of its float form (see `passes/cache/int8_cache.py`).
    A graph of more weights than should be in memory at once runs block by block (see `compiler/blocks.py`).

    `extra_outputs` are tensors of the graph to give back beside its outputs. Raises LlmcError where ONNX
    Runtime cannot run the graph, with its reason.
    """

    def __init__(self, graph: Graph, extra_outputs: Sequence[str] = ()) -> None:
        self._static, self._int8 = StaticCache.of(graph), Int8Cache.of(graph)
        self._types = {tensor.name: numpy_dtype(onnx_dtype(tensor)) for tensor in graph.inputs}
        graph = spell_out(graph) if has_narrow(graph) else graph
        graph = with_unsigned_products(graph) if has_signed_products(graph) else graph
        structure = to_structure(round_halves(graph, extra_outputs) if has_halves(graph) else graph)
        present = {info.name for info in structure.model.graph.output}
        structure.model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in dict.fromkeys(extra_outputs) if name not in present
        )
        self.inputs = [info.name for info in structure.model.graph.input]
        self.outputs = [info.name for info in structure.model.graph.output]
        self._floats = _floats(structure.model.graph.input)
        self._runner: Blocks | Runner = blocks_of(structure) or Runner(structure)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Output name → value. Inputs that the graph does not have (any more) are left out.

        Floats are rounded to the type that the graph takes. What it gives as bfloat16 comes as float32.
        """
        (found,) = self.run_each([feeds], outputs)
        return found

    def run_each(
        self, samples: Iterable[Mapping[str, Array]], outputs: Sequence[str] | None = None
    ) -> Iterator[dict[str, Array]]:
        """The same for each sample in turn. Some may be taken ahead: a large model reads its weights once for many."""
        names = list(outputs) if outputs is not None else self.outputs
        taken: deque[_Back] = deque()

        def given() -> Iterator[dict[str, Array]]:
            for feeds in samples:
                fed, back = self._as_it_is(feeds)
                taken.append(back)
                yield {name: self._given(name, fed[name]) for name in self.inputs if name in fed}

        for values in self._runner.run_each(given(), names):
            yield taken.popleft()(dict(zip(names, values, strict=True)))

    def _as_it_is(self, feeds: Mapping[str, Array]) -> tuple[Mapping[str, Array], _Back]:
        """Inputs in the form that the graph's caches have, and what brings outputs into the form of `feeds`."""
        int8 = self._int8 if self._int8 is not None and self._int8.takes(feeds) else None
        static = self._static if self._static is not None and self._static.takes(feeds) else None
        fed = feeds if int8 is None else int8.feeds(feeds)
        fed = fed if static is None else static.feeds(fed, self._types)

        def back(found: dict[str, Array]) -> dict[str, Array]:
            found = found if static is None else static.outputs(feeds, found)
            return found if int8 is None else int8.outputs(found)

        return fed, back

    def _given(self, name: str, value: Array) -> Array:
        dtype = self._floats.get(name, value.dtype) if value.dtype.kind in "fV" else value.dtype
        return np.asarray(value, dtype, order="C")


def _floats(inputs: Sequence[onnx.ValueInfoProto]) -> dict[str, np.dtype[Any]]:
    """Input → what it is rounded to."""
    kinds = {info.name: info.type.tensor_type.elem_type for info in inputs}
    halves = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return {name: numpy_dtype(kind) for name, kind in kinds.items() if kind in halves}
