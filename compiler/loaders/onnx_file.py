"""ONNX files: read, checked, and every way they come broken told apart."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from llmc.compiler.data import index_bounds
from llmc.compiler.digest import SourceFiles
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Loaded
from llmc.compiler.loaders.images import configuration
from llmc.compiler.onnx_check import check_without
from llmc.compiler.progress import Progress, quiet
from llmc.passes.graph import FileRegion, Graph, Weights, constants, from_model

OPSETS = range(7, 27)
"""Versions of the default operator set that ONNX Runtime and the ONNX checker both take."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def load_onnx(path: Path, *, task: str | None = None, opset: int | None = None, progress: Progress = quiet) -> Loaded:
    """Load an ONNX file; external data must stand in its folder, and stays on disk.

    Raises LlmcError where the file is not a whole and valid ONNX model.
    """
    model = _read(path)
    _check_opset(model, path, opset)
    try:
        outside = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        if outside:  # onnx would refuse a file of weights that has a second name: a cache's, or an artifact's
            check_without(model, outside)
        else:
            onnx.checker.check_model(str(path))
        graph = from_model(model, path.parent)
    except (ValueError, onnx.checker.ValidationError) as error:
        raise LlmcError(f"{path}: {_plain(error)}") from error
    except KeyError as error:  # onnx's table of element types
        raise LlmcError(f"{path}: element type {error} is not one that onnx {onnx.__version__} knows") from error
    _forget_negative_sizes(graph)
    files, read = {path.name: path}, SourceFiles(progress)
    for constant in constants(graph):
        if isinstance(constant._values, Weights) and isinstance(constant._values.source, FileRegion):
            data = constant._values.source.path
            files[data.relative_to(path.parent.resolve()).as_posix()] = data
    return Loaded(
        graph=graph,
        kind="onnx",
        name=path.name,
        digest=read.digest(files),
        files=read.digests,
        task=task,
        vocabulary=index_bounds(graph).get("input_ids"),
        tokenizer=path.parent if (path.parent / "tokenizer.json").is_file() else None,
        processor=path.parent if configuration(path.parent) else None,
    )


def _read(path: Path) -> onnx.ModelProto:
    try:
        with path.open("rb") as file:
            start = file.read(512)
        if not start:
            raise LlmcError(f"{path} is empty")
        if start.startswith(LFS_POINTER):
            raise LlmcError(f"{path} is a git-lfs pointer, not the model itself: run `git lfs pull` where it came from")
        if start.lstrip()[:1] == b"<":
            raise LlmcError(f"{path} is a web page (HTML or XML), not an ONNX model: the download went wrong")
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except OSError as error:
        raise LlmcError(f"{path} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        if start[0] == _IR_VERSION_TAG:
            raise LlmcError(
                f"{path} is truncated or damaged: it begins as an ONNX model, but does not end as one"
            ) from error
        raise LlmcError(f"{path} is not an ONNX model") from error
    if not model.ir_version or not model.HasField("graph"):
        raise LlmcError(f"{path} is not an ONNX model: it has no {'graph' if model.ir_version else 'IR version'}")
    return model


_IR_VERSION_TAG = 0x08
"""The first byte of a serialized ModelProto: field 1 (ir_version), a varint."""


def _check_opset(model: onnx.ModelProto, path: Path, wanted: int | None) -> None:
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    version = versions.get("ai.onnx")
    if not versions:
        raise LlmcError(f"{path} imports no operator set: it is truncated, or not a whole ONNX model")
    if version is None:
        raise LlmcError(f"{path} does not import the ONNX operator set (domain ''), only: {', '.join(versions)}")
    if version not in OPSETS:
        raise LlmcError(f"{path} is at opset {version}; llmc takes {OPSETS.start} to {OPSETS[-1]}")
    if wanted not in (None, version):
        raise LlmcError(
            f"{path} is at opset {version}: the opset {wanted} can be chosen only when llmc exports the model"
        )


def _forget_negative_sizes(graph: Graph) -> None:
    """Some exporters write -1 for a size that they do not know."""
    for tensor in graph.inputs:
        if tensor.shape is not None:
            tensor.shape = [None if isinstance(size, int) and size < 0 else size for size in tensor.shape]


def _plain(error: Exception) -> str:
    """The message in one line; the checker says of a missing file that it is not regular."""
    return " ".join(str(error).split()).replace("it is not regular file", "there is no such file")
