"""`llmc generate --input`: a Whisper that is compiled answers to sound as transformers does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmc.compiler.generation.generate import open_generator
from llmc.compiler.loaders.quiet import quiet
from llmc.passes.errors import LlmcError

TINY_LLAMA = Path(__file__).parents[2] / "assets" / "tiny_llama"
RATE = 16000
TOKENS = 24
RECIPE = """
model: {dimensions: {batch: [1, 1, 4], past_sequence: [0, 8, 63], sequence: [1, 4, 8]}}
passes: [{recipe: optimize}]
target: {kind: onnxruntime}
"""
LANGUAGES = {"<|en|>": 20, "<|de|>": 21, "<|fr|>": 22}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a Whisper that hears one second, knows three languages, and has tokens that it may not say."""
    folder = tmp_path_factory.mktemp("saved")
    config = transformers.WhisperConfig(
        vocab_size=512, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=50,
        max_target_positions=64, decoder_start_token_id=2, pad_token_id=0, bos_token_id=1, eos_token_id=3,
    )  # fmt: skip
    torch.manual_seed(1)
    with quiet():
        model = transformers.WhisperForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0.0, 0.6)
        settings = model.generation_config
        settings.update(
            lang_to_id=LANGUAGES, task_to_id={"transcribe": 30, "translate": 31}, no_timestamps_token_id=40,
            is_multilingual=True, begin_suppress_tokens=[50, 51, 52], suppress_tokens=list(range(60, 300)),
        )  # fmt: skip
        model.save_pretrained(folder)
        transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    shutil.copyfile(TINY_LLAMA / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def recipe() -> str:
    return RECIPE


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """[samples] or [samples, channels] from -1 to 1, as 16 bits each."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def sounds(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    time = np.arange(RATE) / RATE
    return [
        write_wav(folder / "tone.wav", 0.5 * np.sin(2 * np.pi * 440 * time[:9000])),
        write_wav(folder / "noise.wav", 0.2 * rng.standard_normal((RATE, 2)).clip(-4, 4)),
        write_wav(folder / "sweep.wav", 0.7 * np.sin(2 * np.pi * (100 + 2000 * time) * time)),
    ]


def features(checkpoint: Path, files: list[Path]) -> Any:
    """What transformers makes of the files."""
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(checkpoint)
    heard = []
    for path in files:
        with wave.open(str(path)) as file:
            data = np.frombuffer(file.readframes(RATE), "<i2").reshape(-1, file.getnchannels())
        heard.append((data / 32768).mean(axis=1).astype(np.float32))
    return extractor(heard, sampling_rate=RATE, return_tensors="pt").input_features


def expected(checkpoint: Path, files: list[Path]) -> list[str]:
    """What Whisper's own `generate` answers, one sound at a time."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    with quiet(), torch.inference_mode():
        model = transformers.WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
        answers = []
        for row in features(checkpoint, files):
            found = model.generate(row[None], do_sample=False, num_beams=1, max_new_tokens=TOKENS)[0].tolist()
            answers.append(tokenizer.decode([token for token in found if token not in (0, 2, 3, 40)]))
    return answers


def test_answers_are_those_of_transformers(checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    files = sounds(tmp_path)
    truth = expected(checkpoint, files)
    assert len(set(truth)) == 3
    generator = open_generator(artifact, limit=TOKENS)
    feeds, names = generator.read(files)
    assert names == ["tone.wav", "noise.wav", "sweep.wav"]
    # float32 spectra; the same file, read twice
    np.testing.assert_allclose(feeds["input_features"], features(checkpoint, files).numpy(), atol=1e-5)
    assert generator.answers(feeds) == truth
    np.savez(tmp_path / "two.npz", input_features=feeds["input_features"][:2])
    again, names = generator.read([tmp_path / "two.npz", files[2]])
    assert names == ["two.npz, row 0", "two.npz, row 1", "sweep.wav"]
    assert generator.answers(again) == truth
    assert "frames" in str(generator.speed)


@pytest.mark.slow
def test_command(checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    files = sounds(tmp_path)[:2]
    command = [sys.executable, "-m", "llmc.compiler", "generate", str(artifact), "--tokens", str(TOKENS)]
    one = subprocess.run([*command, "--input", str(files[0])], capture_output=True, text=True, check=True)
    truth = expected(checkpoint, files)
    assert one.stdout == truth[0] + "\n"
    inputs = [word for path in files for word in ("--input", str(path))]
    two = subprocess.run([*command, *inputs, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(two.stdout) == [
        {"prompt": path.name, "answer": answer} for path, answer in zip(files, truth, strict=True)
    ]
    text = subprocess.run([*command, "--prompt", "hello"], capture_output=True, text=True, check=False)
    assert text.returncode == 2
    assert "reads input_features, not text: give --input FILE" in text.stderr


def test_what_cannot_be_heard(artifact: Path, tmp_path: Path) -> None:
    generator = open_generator(artifact)
    quick = write_wav(tmp_path / "quick.wav", np.zeros(100), rate=44100)
    long = write_wav(tmp_path / "long.wav", np.zeros(RATE + 1))
    (tmp_path / "text.wav").write_text("RIFF of words", encoding="utf-8")
    (tmp_path / "a.mp3").write_bytes(b"ID3")
    np.savez(tmp_path / "other.npz", input_features=np.zeros((1, 8, 90), np.float32))
    for path, reason in (
        (quick, r"44100 samples a second, the model hears 16000: convert it \(ffmpeg -i .*quick.wav -ar 16000"),
        (long, "lasts 1.0 s, the model hears 1 s at once: cut it"),
        (tmp_path / "text.wav", "is no WAV file that can be read"),
        (tmp_path / "missing.wav", "cannot be read: No such file"),
        (tmp_path / "a.mp3", "is neither .npz nor .wav"),
        (tmp_path / "other.npz", "axis 2 must be 100"),
    ):
        with pytest.raises(LlmcError, match=reason):
            generator.read([path])
