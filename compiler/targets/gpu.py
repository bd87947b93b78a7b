"""NVIDIA GPUs of this machine, asked of the driver itself: no CUDA toolkit, no framework, no context."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver API."""
_NAME_BYTES = 128


@dataclass(frozen=True)
class Gpu:
    """One GPU that CUDA may use (`CUDA_VISIBLE_DEVICES` respected)."""

    name: str
    compute_capability: int
    """SM number: 89 for compute capability 8.9."""
    memory: int
    """Bytes."""


@dataclass(frozen=True)
class Driver:
    """The installed CUDA driver: the newest CUDA version that it runs ('13.0'), and the GPUs that it offers."""

    cuda: str
    gpus: tuple[Gpu, ...]


@cache
def driver() -> Driver | None:
    """The CUDA driver, or None where there is none or it does not start."""
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return ask(library)
    return None


def ask(library: ctypes.CDLL) -> Driver | None:
    """What the CUDA driver API in `library` says; None where it does not start."""
    if library.cuInit(0) != 0:
        return None
    count = _integer(library.cuDeviceGetCount)
    version = _integer(library.cuDriverGetVersion)
    return Driver(f"{version // 1000}.{version % 1000 // 10}", tuple(_gpu(library, i) for i in range(count)))


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    device = _integer(library.cuDeviceGet, index)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _must(library.cuDeviceGetName(name, _NAME_BYTES, device))
    memory = ctypes.c_size_t()
    _must(library.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
    major = _integer(library.cuDeviceGetAttribute, _CAPABILITY_MAJOR, device)
    minor = _integer(library.cuDeviceGetAttribute, _CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(errors="replace"), 10 * major + minor, memory.value)


def _integer(function: ctypes._NamedFuncPointer, *arguments: int) -> int:
    value = ctypes.c_int()
    _must(function(ctypes.byref(value), *arguments))
    return value.value


def _must(status: int) -> None:
    if status != 0:
        raise OSError(f"the CUDA driver answers with error {status}")
