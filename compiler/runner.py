"""One ONNX Runtime session with every optimization off, which reads large weights where they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any, TypeGuard

import numpy as np
import onnx

from llmc.compiler.spill import Spill
from llmc.passes.base import LlmcError
from llmc.passes.graph import FOUR_BIT, Array, Derived, Structure, Weights, contiguous, loaded, raw_values

FED_FROM = 1 << 20
"""Bytes from which a weight is handed over with every run: ONNX Runtime copies those that a session is made with."""


WIDE = 256 << 20
"""Bytes, in float32, from which a computed weight of fewer bits waits in a file."""


class Runner:
    """One model, ready to run on the CPU.

    Nothing is packed for the processor ahead of time: for the few runs that sessions here live, packing costs more
    than it saves. With `lean` memory goes back to the system after each operator, which takes a little longer, and
    `run_values` is the only way to run it. Large weights are read, or computed, when it runs first.
    Raises LlmcError where ONNX Runtime cannot run the model, with its reason.
    """

    def __init__(self, structure: Structure, *, lean: bool = False) -> None:
        import onnxruntime as ort

        given_back = {info.name for info in structure.model.graph.output}
        self._to_feed = {
            name: held
            for name, held in structure.weights.items()
            if held.nbytes >= FED_FROM and name not in given_back and _can_be_fed(held, as_values=lean)
        }
        self._held = {
            name: _ort_value(contiguous(loaded(held)))
            for name, held in structure.weights.items()
            if name not in self._to_feed
        }
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # errors are raised: said once
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.enable_cpu_mem_arena = not lean
        if self._held:
            options.add_external_initializers(list(self._held), list(self._held.values()))
        model = _with_inputs(structure.model, self._to_feed)
        try:
            self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a class of its own for every status code
            raise LlmcError(f"ONNX Runtime cannot run this graph: {error}") from error

    @cached_property
    def _fed(self) -> dict[str, Array]:
        """The weights that are handed over with every run, in memory or mapped."""
        spill = Spill()
        computed = {name: spill.put_weight(held) for name, held in self._to_feed.items() if _waits_in_a_file(held)}
        spilled = spill.values()
        return {
            name: spilled[computed[name]] if name in computed else contiguous(loaded(held))
            for name, held in self._to_feed.items()
        }

    def run_each(self, samples: Iterable[Mapping[str, Array]], outputs: Sequence[str]) -> Iterator[list[Array]]:
        """For each sample the values of `outputs`. Raises LlmcError with the reason where ONNX Runtime fails."""
        for feeds in samples:
            yield _run(self._session.run, {**feeds, **self._fed}, outputs)

    def run_values(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """Of one sample, from OrtValues to OrtValues, which have types that NumPy has not."""
        fed = {name: _ort_value(array) for name, array in self._fed.items()}
        return _run(self._session.run_with_ort_values, {**feeds, **fed}, outputs)


def _run(run: Callable[..., list[Any]], feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
    try:
        return run(list(outputs), feeds)
    except Exception as error:  # as above
        raise LlmcError(f"ONNX Runtime failed while running the graph: {error}") from error


def _waits_in_a_file(held: Array | Weights) -> TypeGuard[Derived]:
    """Whether a computed weight would be too much in memory beside what ONNX Runtime widens it to."""
    return isinstance(held, Derived) and held.dtype.itemsize < 4 and 4 * prod(held.shape) >= WIDE


def _can_be_fed(held: Array | Weights, *, as_values: bool) -> bool:
    """Whether ONNX Runtime takes values of this type with a run: any type as OrtValues, else those of NumPy's own."""
    if as_values:
        return int(onnx.helper.np_dtype_to_tensor_dtype(held.dtype)) not in FOUR_BIT
    return held.dtype.isbuiltin == 1


def _with_inputs(model: onnx.ModelProto, fed: Collection[str]) -> onnx.ModelProto:
    """The model with the weights `fed` as inputs."""
    if not fed:
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    initializers = [tensor for tensor in changed.graph.initializer if tensor.name not in fed]
    for tensor in changed.graph.initializer:
        if tensor.name in fed:
            changed.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    del changed.graph.initializer[:]
    changed.graph.initializer.extend(initializers)
    return changed


def _ort_value(array: Array) -> Any:
    import onnxruntime as ort

    if array.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(array)
    dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    packed = _packed(array, dtype) if dtype in FOUR_BIT else array
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(packed, dtype)


def _packed(array: Array, onnx_dtype: int) -> Array:
    """4-bit values as ONNX Runtime reads them: two a byte, at the start of an array of the shape that it is told."""
    packed = np.frombuffer(raw_values(array, onnx_dtype), np.uint8)
    buffer = np.empty(array.shape, np.uint8)  # what lies behind the values is never touched, and takes no memory
    buffer.reshape(-1)[: packed.size] = packed
    return buffer
