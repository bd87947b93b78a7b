"""A process that runs GPU kernels in Triton's interpreter, on the CPU: triton has to know before it is imported.

Jobs come in on standard input, results go out on standard output, both pickled. A job is (folder of the operator,
inputs by name, outputs by name as (shape, dtype), stride of columns, attributes, whether as a TensorRT plugin); a
result is the outputs by name, or the text of an exception. Outputs are poisoned before the kernel runs, and so is what
lies between strided inputs.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}

import ml_dtypes
import numpy as np
import torch

TYPES = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
}
"""NumPy type that torch does not take → what it is handed over as, and torch's own."""


def tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    stored, own = TYPES.get(array.dtype, (array.dtype, None))
    made = torch.from_numpy(np.array(array).view(stored))
    return made if own is None else made.view(own)


def array(values: torch.Tensor, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    stored, own = TYPES.get(dtype, (dtype, None))
    raw = values if own is None else values.view({np.int16: torch.int16, np.uint8: torch.uint8}[stored])  # type: ignore[index]
    return raw.numpy().view(dtype)


def strided(values: np.ndarray[Any, Any], columns: int) -> torch.Tensor:
    """The same values [rows, n], every `columns`th of a row, rows one element further apart."""
    wide = poisoned((values.shape[0], values.shape[1] * columns + 1), values.dtype)
    view = wide[:, :-1:columns]
    view.copy_(tensor(values))
    return view


def poisoned(shape: Sequence[int], dtype: np.dtype[Any]) -> torch.Tensor:
    """Memory full of NaN, or of the bits 0x55 where the type has none."""
    filled = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0x55, np.uint8).view(dtype).reshape(shape)
    return tensor(filled if np.dtype(dtype).kind in "iu" else np.full(shape, np.nan, dtype))


def run(
    operator: str,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    outputs: Mapping[str, tuple[Sequence[int], np.dtype[Any]]],
    columns: Mapping[str, int],
    attributes: Mapping[str, Any],
    plugin: bool,
) -> dict[str, np.ndarray[Any, Any]]:
    given = {n: strided(v, columns[n]) if n in columns else tensor(v) for n, v in inputs.items()}
    made = {name: poisoned(shape, np.dtype(dtype)) for name, (shape, dtype) in outputs.items()}
    if plugin:
        as_a_plugin(operator, given, made, attributes)
    else:
        importlib.import_module(f"llmc.kernels.{operator}.kernel").launch(**given, **made, **attributes)
    return {name: array(value, np.dtype(outputs[name][1])) for name, value in made.items()}


def as_a_plugin(
    operator: str, given: Mapping[str, Any], made: Mapping[str, Any], attributes: Mapping[str, Any]
) -> None:
    """Launch a kernel as TensorRT does: inputs in the order of the schema, numbers, outputs, all without gaps."""
    spec, plugin = (importlib.import_module(f"llmc.kernels.{operator}.{module}") for module in ("spec", "plugin"))
    inputs = [given[formal.name].contiguous() for formal in spec.SCHEMA.inputs]
    shapes = [tuple(tensor.shape) for tensor in inputs]
    assert [*map(tuple, plugin.results(*shapes))] == [tuple(tensor.shape) for tensor in made.values()]
    grid, numbers, constants, options = plugin.launch(*shapes, **attributes)
    plugin.KERNEL[grid](*inputs, *numbers, *made.values(), **constants, **options)


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            result: object = run(*job)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        pickle.dump(result, out)
        out.flush()
