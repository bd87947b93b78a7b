"""The decoder of an artifact, run by ONNX Runtime at full speed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from llmc.compiler.errors import LlmcError
from llmc.compiler.generation.decoder import LONGEST, Decoder, Input, Run
from llmc.passes.cache.static_cache import KEY, StaticCache


def open_encoder(model: Path) -> tuple[Run, list[Input]]:
    """The encoder of an encoder-decoder, and what it reads. Raises LlmcError where it cannot run here."""
    session = _session(model)
    inputs = _inputs(session)
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        given = {read.name: _ort_value(feeds[read.name].astype(read.dtype, copy=False)) for read in inputs}
        return dict(zip(names, session.run_with_ort_values(names, given), strict=True))

    return run, inputs


def _inputs(session: Any) -> list[Input]:
    return [Input(given.name, _dtype(given.type), tuple(given.shape)) for given in session.get_inputs()]


def _session(model: Path) -> Any:
    import onnxruntime as ort

    if not model.is_file():
        raise LlmcError(f"{model} does not exist; give an artifact that llmc compiled, or an ONNX file")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised: said once
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a class of its own for every status code
        raise LlmcError(f"ONNX Runtime cannot run {model}: {error}") from error


def open_decoder(model: Path) -> Decoder:
    """The decoder in an ONNX file. Raises LlmcError where it is none, or cannot run on this machine."""
    session = _session(model)
    inputs = _inputs(session)
    types = {given.name: given.dtype for given in inputs}
    names = [output.name for output in session.get_outputs()]
    about = session.get_modelmeta().custom_metadata_map
    text, longest = about.get(KEY), int(about[LONGEST]) if LONGEST in about else None
    static = None if text is None else StaticCache.model_validate_json(text)

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Values of a growing cache stay with ONNX Runtime between runs, and are not copied."""
        given = {name: _ort_value(value) for name, value in feeds.items()}
        return dict(zip(names, session.run_with_ort_values(names, given), strict=True))

    def run_static(feeds: Mapping[str, Any]) -> dict[str, Any]:
        assert static is not None
        given = {name: value if isinstance(value, np.ndarray) else value.numpy() for name, value in feeds.items()}
        return static.outputs(given, dict(zip(names, session.run(names, static.feeds(given, types)), strict=True)))

    if static is None:
        return Decoder(inputs, names, run, longest)
    return Decoder([given for given in inputs if given.name != static.past_length], names, run_static, longest)


def _ort_value(value: Any) -> Any:
    import onnxruntime as ort

    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(value)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value, onnx.helper.np_dtype_to_tensor_dtype(value.dtype))


def _dtype(name: str) -> np.dtype[Any]:
    """'tensor(float16)' → float16."""
    kind = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(kind, kind))
