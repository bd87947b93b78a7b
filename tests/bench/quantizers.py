"""Every INT8 quantizer that is compared, from file to file; run as a program, one of them in a process of its own.

    python tests/bench/quantizers.py NAME SOURCE TARGET SAMPLES

SAMPLES is a folder of .npz files, one a sample. Imports nothing that the quantizer does not need: Model Optimizer runs
in an interpreter of its own, where llmc is not installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Quantize = Callable[[Path, Path, list[dict[str, Any]]], None]


def llmc(recipe: str) -> Quantize:
    """The passes of a recipe, without verification."""
    from llmc.compiler.calibrate import SampledActivations
    from llmc.compiler.recipe import Recipe
    from llmc.passes.base import Context, Skip
    from llmc.passes.graph import load_model, save_model

    def quantize(source: Path, target: Path, samples: list[dict[str, Any]]) -> None:
        graph = load_model(source)
        context = Context(activations=SampledActivations(samples))
        for step in Recipe.load(recipe).passes:
            try:
                step.run(graph, context)
            except Skip:
                continue
        save_model(graph, target)

    return quantize


def _reader(samples: list[dict[str, Any]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[dict[str, Any]] = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

        def rewind(self) -> None:
            self.left = iter(samples)

        def get_first(self) -> dict[str, Any]:
            return samples[0]

    return Reader()


def ort_static(method: str) -> Quantize:
    """ONNX Runtime's quantize_static as its documentation advises: pre-processed, QDQ, per-channel weights."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    def quantize(source: Path, target: Path, samples: list[dict[str, Any]]) -> None:
        prepared = target.with_name("prepared.onnx")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            _reader(samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
        )

    return quantize


def ort_dynamic() -> Quantize:
    """ONNX Runtime's quantize_dynamic, per-channel weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    def quantize(source: Path, target: Path, samples: list[dict[str, Any]]) -> None:  # noqa: ARG001
        prepared = target.with_name("prepared.onnx")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(str(prepared), str(target), per_channel=True, weight_type=QuantType.QInt8)

    return quantize


def ort_fused_dynamic() -> Quantize:
    """ONNX Runtime's optimizer of transformers, then its quantize_dynamic: products of attention in INT8 too."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    def quantize(source: Path, target: Path, samples: list[dict[str, Any]]) -> None:  # noqa: ARG001
        fused = target.with_name("fused.onnx")
        optimizer.optimize_model(str(source), model_type="bert", opt_level=0).save_model_to_file(str(fused))
        types = {"DefaultTensorType": TensorProto.FLOAT}  # of operators that shape inference does not know
        quantize_dynamic(str(fused), str(target), per_channel=True, weight_type=QuantType.QInt8, extra_options=types)

    return quantize


def modelopt(method: str) -> Quantize:
    """NVIDIA Model Optimizer, the rest kept in FP32 as the others have it."""
    from modelopt.onnx.quantization import quantize as run

    def quantize(source: Path, target: Path, samples: list[dict[str, Any]]) -> None:
        run(
            onnx_path=str(source),
            quantize_mode="int8",
            calibration_method=method,
            calibration_data_reader=_reader(samples),
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(target),
        )

    return quantize


QUANTIZERS: dict[str, Callable[[], Quantize]] = {
    "llmc static": lambda: llmc("onnxruntime-int8-static"),
    "llmc dynamic": lambda: llmc("onnxruntime-int8"),
    "ort static minmax": lambda: ort_static("MinMax"),
    "ort static entropy": lambda: ort_static("Entropy"),
    "ort static percentile": lambda: ort_static("Percentile"),
    "ort dynamic": ort_dynamic,
    "ort fused dynamic": ort_fused_dynamic,
    "modelopt max": lambda: modelopt("max"),
    "modelopt entropy": lambda: modelopt("entropy"),
}


def main(name: str, source: Path, target: Path, folder: Path) -> None:
    import numpy as np

    samples = []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as arrays:
            samples.append(dict(arrays))
    os.chdir(target.parent)  # quantizers leave files of theirs in the working directory
    QUANTIZERS[name]()(source, target, samples)


if __name__ == "__main__":
    main(sys.argv[1], *(Path(argument).resolve() for argument in sys.argv[2:5]))
