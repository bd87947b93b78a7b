"""Prompts in, texts out: what `llmc generate` does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.compiler.errors import LlmcError
from llmc.compiler.generation.choosing import Choose, greedy
from llmc.compiler.generation.decoder import Decoder, pad_left
from llmc.compiler.generation.encoder_decoder import EncoderDecoder, pad_right
from llmc.compiler.generation.onnx_decoder import open_decoder, open_encoder
from llmc.compiler.generation.tokenizer import FOLDER, Tokenizer
from llmc.compiler.loaders import HALVES
from llmc.passes.graph import Array

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Speed:
    """How fast a run was, in tokens of all prompts together."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0

    def __str__(self) -> str:
        prompt = self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0
        line = f"prompt: {self.prompt_tokens} tokens, {prompt:.0f} tokens/s"
        if self.decode_seconds:
            line += f"; answer: {self.new_tokens} tokens, {self.new_tokens / self.decode_seconds:.1f} tokens/s"
        return line


@dataclass
class Generator:
    """A decoder and its tokenizer, ready for prompts."""

    decoder: Decoder | EncoderDecoder
    tokenizer: Tokenizer
    limit: int
    """The most new tokens."""
    choose: Choose = greedy
    raw: bool = False
    """Prompts go in as they are, without the chat template."""
    speed: Speed = field(default_factory=Speed)

    def stream(self, prompt: str) -> Iterator[str]:
        """The answer to one prompt, piece by piece."""
        return self.tokenizer.stream(token for (token,) in self._tokens([prompt]) if token is not None)

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """The answers to several prompts, generated side by side."""
        kept: list[list[int]] = [[] for _ in prompts]
        for tokens in self._tokens(prompts):
            for row, token in zip(kept, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return [self.tokenizer.decode(row) for row in kept]

    def _tokens(self, prompts: Sequence[str]) -> Iterator[list[int | None]]:
        """The next token of each prompt, None from its end on."""
        chat = self.tokenizer.has_chat and not self.raw
        encoded = [self.tokenizer.encode(prompt, chat) for prompt in prompts]
        running = [True] * len(prompts)
        started = time.perf_counter()
        for number, tokens in enumerate(self._stream(encoded), start=1):
            running = [on and int(token) not in self.tokenizer.stops for on, token in zip(running, tokens, strict=True)]
            self._count(number, sum(map(len, encoded)), sum(running), time.perf_counter() - started)
            if not any(running):
                return
            yield [int(token) if on else None for on, token in zip(running, tokens, strict=True)]
            if number == self.limit:
                return
            started = time.perf_counter()

    def _stream(self, prompts: Sequence[Sequence[int]]) -> Iterator[Array]:
        if isinstance(self.decoder, EncoderDecoder):
            return self.decoder.generate(pad_right(prompts), self.choose)
        return self.decoder.generate(*pad_left(prompts), self.choose)

    def _count(self, number: int, prompt: int, new: int, seconds: float) -> None:
        if number == 1:
            self.speed.prompt_tokens += prompt
            self.speed.prompt_seconds += seconds
        else:
            self.speed.new_tokens += new
            self.speed.decode_seconds += seconds


def open_generator(
    artifact: Path,
    *,
    tokenizer: Path | None = None,
    limit: int = 128,
    choose: Choose = greedy,
    raw: bool = False,
) -> Generator:
    """A generator from an artifact's folder, or from an ONNX file.

    Raises LlmcError where there is no decoder, or no tokenizer.
    """
    model = artifact / "model.onnx" if artifact.is_dir() else artifact
    folder = tokenizer or (artifact if artifact.is_dir() else artifact.parent) / FOLDER
    encoder, decoder = (artifact / half / "model.onnx" for half in HALVES)
    if encoder.is_file() and decoder.is_file():
        encode = open_encoder(encoder)
        words = Tokenizer(folder)
        return Generator(EncoderDecoder(encode, open_decoder(decoder), words.first), words, limit, choose, raw)
    return Generator(open_decoder(model), Tokenizer(folder), limit, choose, raw)


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file, one a line. Raises LlmcError where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LlmcError(f"{path} cannot be read as UTF-8 text: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise LlmcError(f"{path} holds no prompts: it needs one a line")
    return prompts


def render(answers: Sequence[Mapping[str, str]], console: Console) -> None:
    """Print each prompt, quoted, above its answer."""
    for line in answers:
        for text in (f"> {line['prompt']}", line["answer"], ""):
            console.print(text, markup=False, highlight=False, soft_wrap=True)
