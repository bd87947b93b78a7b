"""The doctor says what stands on this machine, and imports nothing heavy to find out."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib import metadata

import pytest
from rich.console import Console

from llmc.compiler import doctor
from llmc.compiler.doctor import Diagnosis, examine, render
from llmc.compiler.targets import Availability, gpu


def printed(diagnosis: Diagnosis) -> str:
    stream = io.StringIO()
    render(diagnosis, Console(file=stream, width=200))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_names_every_target_and_true_versions() -> None:
    diagnosis = examine()
    assert [target.kind for target in diagnosis.targets] == ["tensorrt", "tensorrt-rtx", "onnxruntime", "onnx"]
    assert diagnosis.packages["numpy"] == metadata.version("numpy")
    assert diagnosis.packages["onnxruntime"] == metadata.version("onnxruntime")
    able = [target.kind for target in diagnosis.targets if not target.missing]
    assert diagnosis.auto == able[0]
    json.dumps(diagnosis.model_dump(mode="json"))
    assert f"onnx {metadata.version('onnx')}" in printed(diagnosis)


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys; from llmc.compiler.doctor import examine; examine(); "
        "print([m for m in ('torch', 'transformers', 'onnxruntime', 'tensorrt_rtx_bindings', 'tensorrt', 'polygraphy', "
        "'onnxruntime_ep_nv_tensorrt_rtx') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_shows_gpus_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu.Driver("13.0", (gpu.Gpu("NVIDIA Test", 89, 24 << 30),))
    targets = (
        Availability("tensorrt", "", "tensorrt is not installed", "pip install 'llmc-compiler[tensorrt]'"),
        Availability("tensorrt-rtx", "1.7.1.116"),
        Availability("onnx", "1.23.2"),
    )
    monkeypatch.setattr(doctor, "driver", lambda: found)
    monkeypatch.setattr(doctor, "availability", lambda: targets)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "torch" else name)
    text = printed(examine())
    assert "NVIDIA Test (SM89, 24 GiB), driver for CUDA 13.0" in text
    assert (
        "✗  tensorrt      tensorrt is not installed; install it with: pip install 'llmc-compiler[tensorrt]'\n" in text
    )
    assert "✓  tensorrt-rtx  1.7.1.116  (what target 'auto' means here)\n" in text
    assert "✗  huggingface  not installed: torch; install it with: pip install 'llmc-compiler[hf]'\n" in text
