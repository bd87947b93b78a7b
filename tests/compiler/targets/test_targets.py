"""Which target 'auto' is, and why not another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmc.compiler.errors import TargetError
from llmc.compiler.targets import TargetKind, gpu, resolve, tensorrt_import

GPU = gpu.Driver("13.0", (gpu.Gpu("NVIDIA Test", 89, 1 << 30),))


class Machine:
    """A machine with or without a GPU, and modules that can be found on it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def has(self, driver: gpu.Driver | None, *modules: str, **versions: str) -> None:
        self.patch.setattr(tensorrt_import, "driver", lambda: driver)
        self.patch.setattr(tensorrt_import, "find_spec", lambda name: name in modules or None)
        known = {name.replace("_", "-"): version for name, version in versions.items()}
        self.patch.setattr(
            tensorrt_import, "installed_version", lambda *names: next((known[n] for n in names if n in known), "")
        )
        tensorrt_import.availability.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch)
    tensorrt_import.availability.cache_clear()


@pytest.mark.parametrize(
    ("driver", "modules", "kind", "why"),
    [
        (GPU, ("tensorrt", "tensorrt_rtx", "polygraphy"), "tensorrt", "the first that can build here"),
        (
            GPU,
            ("tensorrt_rtx", "polygraphy"),
            "tensorrt-rtx",
            "the first that can build here; not tensorrt: tensorrt is not installed",
        ),
        (
            None,
            ("tensorrt", "tensorrt_rtx", "polygraphy"),
            "tensorrt-rtx",
            "the first that can build here; not tensorrt: this machine has no NVIDIA GPU that CUDA can use, "
            "and TensorRT builds on a GPU only",
        ),
        (
            GPU,
            ("tensorrt", "tensorrt_rtx"),
            "onnxruntime",
            "the first that can build here; not tensorrt: polygraphy is not installed; "
            "not tensorrt-rtx: polygraphy is not installed",
        ),
    ],
)
def test_auto_is_the_first_that_can_build(
    machine: Machine, driver: gpu.Driver | None, modules: tuple[str, ...], kind: TargetKind, why: str
) -> None:
    machine.has(driver, *modules)
    target = resolve("auto")
    assert target.kind == kind
    assert target.reason == why


@pytest.mark.parametrize("kind", ["onnxruntime", "onnx"])
def test_a_kind_that_is_asked_for_has_no_reason(kind: TargetKind) -> None:
    target = resolve(kind)
    assert (target.kind, target.reason) == (kind, "")
    assert all(target.versions.values())


@pytest.mark.parametrize(
    ("driver", "modules", "kind", "message"),
    [
        (GPU, ("polygraphy",), "tensorrt", r"not installed; install it with: pip install 'llmc-compiler\[tensorrt\]'"),
        (None, ("polygraphy", "tensorrt"), "tensorrt", "builds on a GPU only; tensorrt-rtx builds without a GPU"),
        (
            None,
            ("polygraphy",),
            "tensorrt-rtx",
            r"are not installed; install it with: pip install 'llmc.*rtx\]'",
        ),
        (None, ("polygraphy", "tensorrt_rtx_bindings"), "tensorrt-rtx", "libraries are not installed"),
    ],
)
def test_a_kind_that_cannot_build_here_says_what_to_do(
    machine: Machine, driver: gpu.Driver | None, modules: tuple[str, ...], kind: TargetKind, message: str
) -> None:
    machine.has(driver, *modules)
    with pytest.raises(TargetError, match=message):
        resolve(kind)


def test_an_old_tensorrt_is_refused(machine: Machine) -> None:
    machine.has(GPU, "tensorrt", "polygraphy", tensorrt="10.9.0.34")
    with pytest.raises(TargetError, match=r"tensorrt 10\.9\.0\.34 is installed, which is older than 11"):
        resolve("tensorrt")


def test_bindings_and_libraries_of_different_versions_are_refused(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has(None, "tensorrt_rtx_bindings", "polygraphy", tensorrt_rtx_cu13_bindings="1.8.0.10")
    monkeypatch.setattr(tensorrt_import, "_rtx_libraries", lambda: (tmp_path / "libtensorrt_rtx.so.1.7.1",))
    with pytest.raises(TargetError, match=r"bindings are of version 1\.8\.0\.10, but the libraries of version 1\.7\.1"):
        resolve("tensorrt-rtx")
