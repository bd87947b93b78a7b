"""Runs a Graph in ONNX Runtime with every optimization off: the truth that verification and calibration stand on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from llmc.compiler.half import has_halves, round_halves
from llmc.passes.base import LlmcError
from llmc.passes.cache.static_cache import StaticCache
from llmc.passes.graph import FOUR_BIT, Array, Graph, Weights, numpy_dtype, onnx_dtype, raw_values, to_structure

_FLOATS: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}


class Session:
    """One graph, ready to run on the CPU. Weights are shared with the graph, not copied.

    float16 and bfloat16 round after every operator, as on a GPU (see `compiler/half.py`). A graph with a static cache
    takes inputs, and gives outputs, of its growing form as well (see `passes/cache/static_cache.py`).

    Weights are not packed for the processor ahead of time: for the few runs that sessions here live, packing costs
    more than it saves.

    `extra_outputs` are tensors of the graph to give back beside its outputs. Raises LlmcError where ONNX
    Runtime cannot run the graph, with its reason.
    """

    def __init__(self, graph: Graph, extra_outputs: Sequence[str] = ()) -> None:
        import onnxruntime as ort

        self._cache = StaticCache.of(graph)
        self._types = {tensor.name: numpy_dtype(onnx_dtype(tensor)) for tensor in graph.inputs}
        structure = to_structure(round_halves(graph) if has_halves(graph) else graph)
        present = {info.name for info in structure.model.graph.output}
        structure.model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in dict.fromkeys(extra_outputs) if name not in present
        )
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # errors are raised: said once
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self._values = _ort_values(structure.weights)
        if self._values:
            options.add_external_initializers(list(self._values), list(self._values.values()))
        try:
            self._session = ort.InferenceSession(
                structure.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises a class of its own for every status code
            raise LlmcError(f"ONNX Runtime cannot run this graph: {error}") from error
        self.inputs = [i.name for i in self._session.get_inputs()]
        self._floats = {i.name: _FLOATS[i.type] for i in self._session.get_inputs() if i.type in _FLOATS}
        self.outputs = [o.name for o in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Output name → value. Inputs that the graph does not have (any more) are left out.

        Floats are rounded to the type that the graph takes. What it gives as bfloat16 comes as float32.
        """
        names = list(outputs) if outputs is not None else self.outputs
        cache = self._cache if self._cache is not None and self._cache.takes(feeds) else None
        fed = feeds if cache is None else cache.feeds(feeds, self._types)
        given = {name: self._given(name, fed[name]) for name in self.inputs if name in fed}
        try:
            values = self._session.run(names, given)
        except Exception as error:
            raise LlmcError(f"ONNX Runtime failed while running the graph: {error}") from error
        found = dict(zip(names, values, strict=True))
        return found if cache is None else cache.outputs(feeds, found)

    def _given(self, name: str, value: Array) -> Array:
        dtype = self._floats.get(name, value.dtype) if value.dtype.kind in "fV" else value.dtype
        return np.asarray(value, dtype, order="C")


def _ort_values(weights: Mapping[str, Array | Weights]) -> dict[str, Any]:
    import onnxruntime as ort

    values = {}
    for name, held in weights.items():
        array = np.asarray(held.load() if isinstance(held, Weights) else held, order="C")
        if array.dtype.isbuiltin == 1:
            values[name] = ort.OrtValue.ortvalue_from_numpy(array)
            continue
        dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        if dtype in FOUR_BIT:
            array = _packed(array, dtype)
        values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, dtype)
    return values


def _packed(array: Array, onnx_dtype: int) -> Array:
    """4-bit values as ONNX Runtime reads them: two a byte, at the start of an array of the shape that it is told."""
    packed = np.frombuffer(raw_values(array, onnx_dtype), np.uint8)
    buffer = np.empty(array.shape, np.uint8)  # what lies behind the values is never touched, and takes no memory
    buffer.reshape(-1)[: packed.size] = packed
    return buffer
