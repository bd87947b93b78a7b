"""What the CUDA driver is asked, with a driver that is made up."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from llmc.compiler.targets.gpu import Gpu, ask


class FakeCuda:
    """The functions of libcuda that are used, for a machine with these (name, major, minor, bytes)."""

    def __init__(self, *devices: tuple[bytes, int, int, int], init: int = 0, count_status: int = 0) -> None:
        self.devices = devices
        self.init = init
        self.count_status = count_status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.devices)
        return self.count_status

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13010
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, buffer: Any, length: int, device: int) -> int:  # noqa: N802
        assert length == len(buffer)
        buffer.value = self.devices[device][0]
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: int) -> int:  # noqa: N802
        assert isinstance(size._obj, ctypes.c_size_t)
        size._obj.value = self.devices[device][3]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:  # noqa: N802
        value._obj.value = self.devices[device][{75: 1, 76: 2}[attribute]]
        return 0


def test_lists_each_gpu() -> None:
    found = ask(FakeCuda((b"NVIDIA A", 8, 9, 24 << 30), (b"NVIDIA B", 12, 0, 32 << 30)))  # type: ignore[arg-type]
    assert found is not None
    assert found.cuda == "13.1"
    assert found.gpus == (Gpu("NVIDIA A", 89, 24 << 30), Gpu("NVIDIA B", 120, 32 << 30))


def test_a_driver_that_does_not_start_is_none() -> None:
    assert ask(FakeCuda(init=100)) is None  # type: ignore[arg-type]  # 100: CUDA_ERROR_NO_DEVICE


def test_an_error_of_a_started_driver_is_not_swallowed() -> None:
    with pytest.raises(OSError, match="error 3"):
        ask(FakeCuda(count_status=3))  # type: ignore[arg-type]
