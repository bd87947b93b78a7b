"""Sound as a model's own configuration prepares it: WAV files to what the model's first layer takes."""

from __future__ import annotations

import wave
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.images import configuration
from llmc.compiler.loaders.quiet import quiet
from llmc.passes.graph import Array


class SoundProcessor:
    """What `folder` says, done by transformers, which is imported with the first file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, path: Path) -> dict[str, Array]:
        """The arrays that a feature extractor makes of one WAV file, with a first axis of 1.

        Several channels become one, their mean. Raises LlmcError where the file is none, has another rate than the
        model was trained with, or lasts longer than the model hears at once.
        """
        extractor = self._extractor
        samples, rate = read_wav(path)
        wanted = extractor.sampling_rate
        if rate != wanted:
            raise LlmcError(f"{path} has {rate} samples a second, the model hears {wanted}: {_convert(path, wanted)}")
        longest = getattr(extractor, "n_samples", None)
        if longest is not None and len(samples) > longest:
            raise LlmcError(
                f"{path} lasts {len(samples) / rate:.1f} s, the model hears {longest / rate:g} s at once: cut it"
            )
        with quiet():
            made = extractor(samples, sampling_rate=rate, return_tensors="np")
        return {name: value for name, value in made.items() if isinstance(value, np.ndarray)}

    @cached_property
    def _extractor(self) -> Any:
        if configuration(self.folder) is None:
            raise LlmcError(
                f"{self.folder} has no preprocessor_config.json, which says how sound is prepared: give --tokenizer "
                "DIR, a folder with it and tokenizer.json, or sound as .npz"
            )
        try:
            with quiet():
                from transformers import AutoFeatureExtractor
        except ImportError as error:
            raise LlmcError("transformers prepares sound: pip install 'llmc-compiler[hf]', or give .npz") from error
        try:
            with quiet():
                return AutoFeatureExtractor.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # missing files, wrong JSON, unknown classes: no class in common
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LlmcError(f"{self.folder}: transformers cannot read its feature extractor: {reason}") from error


def read_wav(path: Path) -> tuple[Array, int]:
    """Samples of a WAV file, float32 [samples] from -1 to 1, and how many a second has.

    Raises LlmcError where it is none that is not compressed.
    """
    try:
        with wave.open(str(path)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except OSError as error:
        raise LlmcError(f"{path} cannot be read: {error.strerror}") from error
    except (wave.Error, EOFError) as error:
        reason = str(error) or "it ends too early"
        raise LlmcError(f"{path} is no WAV file that can be read: {reason}: {_convert(path, 16000)}") from error
    frames = len(data) // (width * channels)
    if not frames:
        raise LlmcError(f"{path} has no samples")
    content: Array = np.frombuffer(data, np.uint8, frames * channels * width).reshape(frames, channels, width)
    if width == 1:
        content = content ^ 0x80  # samples of one byte are the only ones without a sign
    wide = np.zeros((frames, channels, 4), np.uint8)
    wide[..., 4 - width :] = content
    samples = wide.view("<i4")[..., 0] / 2.0**31
    return samples.mean(axis=1).astype(np.float32), rate


def _convert(path: Path, rate: int) -> str:
    return f"convert it (ffmpeg -i {path} -ar {rate} -c:a pcm_s16le {path.stem}-{rate}.wav)"
