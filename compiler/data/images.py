"""Samples that an image processor makes of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmc.compiler import versions
from llmc.compiler.data.fit import text
from llmc.compiler.data.samples import Samples, graph_inputs
from llmc.compiler.digest import digest_files
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Feeds
from llmc.compiler.loaders.images import CONFIGURATIONS, PACKAGES, ImageProcessor, configuration
from llmc.passes.graph import Array, Graph, Tensor, shape_of

SUFFIXES = (".png", ".jpg", ".jpeg")
PIXELS = "pixel_values"
"""What processors call the picture itself."""


def is_image(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in SUFFIXES


def from_images(path: Path, graph: Graph, processor: Path | None) -> Samples:
    """A sample a picture, by name: of the folder `path`, or of the file."""
    files = sorted(file for file in path.iterdir() if is_image(file)) if path.is_dir() else [path]
    found = configuration(processor) if processor is not None else None
    if processor is None or found is None:
        where = f"{processor} has" if processor is not None else f"{path} holds images; the model brings"
        names = " nor ".join(CONFIGURATIONS)
        raise LlmcError(f"{where} neither {names}: name the folder of one in model.processor of the recipe")
    prepare = Preparer(path, graph, ImageProcessor(processor))
    settings = [found, *(file for file in [processor / "config.json"] if file.is_file())]
    digests = [digest_files({file.name: file for file in group}) for group in (files, settings)]
    made_by = [f"{name} {version}" for name, version in versions.installed(PACKAGES).items()]
    digest = hashlib.sha256("\n".join([*digests, *made_by]).encode()).hexdigest()
    return Samples(path.name, digest, False, len(files), lambda: map(prepare, files), PACKAGES)


class Preparer:
    """One picture → the graph's inputs, batch 1."""

    def __init__(self, path: Path, graph: Graph, processor: ImageProcessor) -> None:
        self.processor = processor
        self.inputs = {tensor.name: tensor for tensor in graph_inputs(graph)}
        self.picture = _picture(path, self.inputs)
        batch, self.channels = (shape_of(self.picture) or ())[:2]
        if isinstance(batch, int) and batch != 1:
            raise LlmcError(f"{path}: a picture is a sample, but the model's batch is fixed at {batch}: give .npz")
        if isinstance(self.channels, int) and self.channels not in (1, 3):
            raise LlmcError(
                f"{path}: pictures have 3 channels, or 1 in gray, the model's '{self.picture.name}' "
                f"has {self.channels}: give .npz"
            )

    def __call__(self, file: Path) -> Feeds:
        """Raises LlmcError where what the processor makes is not what the model takes."""
        made = self.processor(file, 1 if self.channels == 1 else 3)
        if PIXELS in made and PIXELS not in self.inputs:
            made[self.picture.name] = made.pop(PIXELS)
        missing = [name for name in self.inputs if name not in made]
        if missing:
            raise LlmcError(
                f"{file}: the image processor in {self.processor.folder} makes {', '.join(made)}, which does not fill "
                f"the model's input '{missing[0]}': give .npz"
            )
        return {name: self._fitting(made[name], tensor, file) for name, tensor in self.inputs.items()}

    def _fitting(self, values: Array, tensor: Tensor, file: Path) -> Array:
        wanted = shape_of(tensor)
        fixed = [(size, of) for size, of in zip(values.shape, wanted or (), strict=False) if isinstance(of, int)]
        if wanted is not None and (values.ndim != len(wanted) or any(size != of for size, of in fixed)):
            raise LlmcError(
                f"{file}: the image processor in {self.processor.folder} makes '{tensor.name}' {list(values.shape)}, "
                f"the model takes {text(wanted)}: is it this model's?"
            )
        dtype = np.dtype(tensor.dtype) if tensor.dtype is not None else values.dtype
        if dtype.kind in "iub" and values.dtype.kind not in "iub":
            raise LlmcError(
                f"{file}: the image processor makes '{tensor.name}' {values.dtype}, the model takes {dtype}"
            )
        return values.astype(dtype, copy=False)


def _picture(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """The input that takes pictures: pixel_values, or the one with four dimensions."""
    if PIXELS in inputs:
        return inputs[PIXELS]
    found = [tensor for tensor in inputs.values() if len(shape_of(tensor) or ()) == 4]
    if len(found) != 1:
        raise LlmcError(
            f"{path} holds pictures, and of the model's inputs ({', '.join(inputs)}) not one has four dimensions: "
            "give .npz"
        )
    return found[0]
