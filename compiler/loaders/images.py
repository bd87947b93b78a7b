"""Image processors: pictures as a model's own configuration prepares them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.quiet import quiet
from llmc.passes.graph import Array

if TYPE_CHECKING:
    from PIL.Image import Image

CONFIGURATIONS = ("preprocessor_config.json", "processor_config.json")
"""Files that say how pictures are prepared, the first that is there; multimodal models have it in the second."""
PACKAGES = ("pillow", "transformers")
"""Whose versions have a say in the values."""
SHADES = ("1", "L", "LA")
"""Pillow's modes of pictures with one channel of 8 bits or fewer."""


def configuration(folder: Path) -> Path | None:
    """The file in `folder` that says how pictures are prepared."""
    return next((folder / name for name in CONFIGURATIONS if (folder / name).is_file()), None)


class ImageProcessor:
    """What `folder` says, done by transformers with Pillow and NumPy, whether torchvision is installed or not.

    transformers is imported with the first picture.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, path: Path, channels: int) -> dict[str, Array]:
        """The arrays that a processor makes of one picture, pixel_values [1, channels, height, width] among them.

        Read as transformers' pipelines do: turned as its EXIF data says, and made RGB; with one channel, left gray.
        Raises LlmcError where the file is no picture, or is none with so many channels.
        """
        processor = self._processor
        with quiet():
            picture = _read(path, channels)
            try:
                made = processor(images=picture, return_tensors="np")
            except Exception as error:  # whatever the processor's class raises for what it does not take
                raise LlmcError(f"{path}: the image processor in {self.folder} cannot prepare it: {error}") from error
        return {name: value for name, value in made.items() if isinstance(value, np.ndarray)}

    @cached_property
    def _processor(self) -> Any:
        try:
            with quiet():
                import PIL  # noqa: F401 - transformers names another culprit where it is missing
                from transformers import AutoImageProcessor
        except ImportError as error:
            raise LlmcError(
                f"{error.name or 'transformers'} is missing, which prepares images: pip install 'llmc-compiler[hf]'"
            ) from error
        try:
            with quiet():
                return AutoImageProcessor.from_pretrained(
                    self.folder, backend="pil", local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # missing files, wrong JSON, unknown classes: no class in common
            raise LlmcError(f"{self.folder}: transformers cannot read its image processor: {_line(error)}") from error


def _read(path: Path, channels: int) -> Image:
    import PIL.Image
    import PIL.ImageOps

    try:
        with PIL.Image.open(path) as file:
            picture = PIL.ImageOps.exif_transpose(file)
            picture.load()
    except Exception as error:  # damaged files raise whatever their bytes led Pillow to
        raise LlmcError(f"{path} is not an image that can be read: {_line(error)}") from error
    if picture.mode[0] in "IF":
        raise LlmcError(f"{path} has more than 8 bits a channel (mode {picture.mode}): save it with 8, or give .npz")
    if channels == 1 and picture.mode not in SHADES:
        raise LlmcError(f"{path} is in colour (mode {picture.mode}), the model takes one channel: save it in gray")
    return picture.convert("L" if channels == 1 else "RGB")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
