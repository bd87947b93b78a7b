"""Finds and loads TensorRT, full or RTX, wherever pip put it."""

from __future__ import annotations

import ctypes
import importlib
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

from llmc.compiler.targets import Availability, installed_version
from llmc.compiler.targets.gpu import driver

Kind = Literal["tensorrt", "tensorrt-rtx"]
PRODUCT: dict[Kind, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_INSTALL: dict[Kind, str] = {
    "tensorrt": "pip install 'llmc-compiler[tensorrt]'",
    "tensorrt-rtx": "pip install 'llmc-compiler[rtx]'",
}
_DISTRIBUTIONS: dict[Kind, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
}
_LEAST_MAJOR = 11
"""Of full TensorRT: from this version on every network is strongly typed."""
_RTX_BINDINGS = "tensorrt_rtx_bindings"
_RTX_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
"""The module whose wheel carries the libraries; never imported, because its import writes into site-packages."""


@cache
def availability(kind: Kind) -> Availability:
    """Whether this kind of TensorRT can build here, without importing it."""
    version = installed_version(*_DISTRIBUTIONS[kind])
    missing = _missing(kind, version)
    return Availability(kind, version, missing, _INSTALL[kind] if missing and driver_suffices(kind) else "")


def driver_suffices(kind: Kind) -> bool:
    """Full TensorRT builds on a GPU only; TensorRT-RTX needs none."""
    found = driver()
    return kind == "tensorrt-rtx" or (found is not None and bool(found.gpus))


def load(kind: Kind) -> ModuleType:
    """Import this kind of TensorRT. As `tensorrt_rtx` it is there for Polygraphy too."""
    if kind == "tensorrt" or find_spec("tensorrt_rtx"):
        return importlib.import_module(kind.replace("-", "_"))
    for library in _rtx_libraries():
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    return sys.modules.setdefault("tensorrt_rtx", importlib.import_module(_RTX_BINDINGS))


def _missing(kind: Kind, version: str) -> str:
    if not driver_suffices(kind):
        return "this machine has no NVIDIA GPU that CUDA can use, and TensorRT builds on a GPU only"
    if not find_spec("polygraphy"):
        return "polygraphy is not installed"
    if kind == "tensorrt":
        return _full_missing(version)
    if find_spec("tensorrt_rtx"):
        return ""
    if not find_spec(_RTX_BINDINGS):
        return "the TensorRT-RTX bindings are not installed"
    libraries = _rtx_libraries()
    if not libraries:
        return "the TensorRT-RTX libraries are not installed"
    library_version = libraries[0].name.partition(".so.")[2]
    if not version.startswith(library_version):
        return f"the TensorRT-RTX bindings are of version {version}, but the libraries of version {library_version}"
    return ""


def _full_missing(version: str) -> str:
    if not find_spec("tensorrt"):
        return "tensorrt is not installed"
    if version and int(version.partition(".")[0]) < _LEAST_MAJOR:
        return f"tensorrt {version} is installed, which is older than {_LEAST_MAJOR}"
    return ""


def _rtx_libraries() -> tuple[Path, ...]:
    """The builder and the ONNX parser, in the order in which they must be loaded; empty where one is not there."""
    spec = find_spec(_RTX_LIBRARIES)
    if spec is None or spec.origin is None:
        return ()
    folder = Path(spec.origin).parent
    found = [sorted(folder.glob(f"{name}.so.*")) for name in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx")]
    return tuple(paths[0] for paths in found if paths) if all(found) else ()
