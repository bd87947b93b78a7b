"""Sound, read from WAV files."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.sound import SoundProcessor, read_wav


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples(tmp_path: Path, width: int, channels: int) -> None:
    """Python's own integers are the truth: two's complement, but one byte stands for -128 to 127 as 0 to 255."""
    rng = np.random.default_rng(0)
    top = 2 ** (8 * width - 1)
    values = [[int(value) for value in row] for row in rng.integers(-top, top, (50, channels))]
    values[0], values[1] = [-top] * channels, [top - 1] * channels
    data = b"".join(
        (value + 128).to_bytes(1, "little") if width == 1 else value.to_bytes(width, "little", signed=True)
        for row in values
        for value in row
    )
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(data)
    samples, rate = read_wav(tmp_path / "a.wav")
    assert (rate, samples.dtype) == (8000, np.float32)
    expected = [sum(row) / channels / top for row in values]
    np.testing.assert_allclose(samples, expected, rtol=0, atol=2**-24)  # of 1: float32's rounding


def test_a_folder_that_does_not_say_how(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"has no preprocessor_config.json, which says how sound is prepared"):
        SoundProcessor(tmp_path)(tmp_path / "a.wav")
    (tmp_path / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(LlmcError, match="transformers cannot read its feature extractor"):
        SoundProcessor(tmp_path)(tmp_path / "a.wav")
