"""Prompts in, texts out: what `llmc generate` does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.compiler.errors import LlmcError
from llmc.compiler.generation.choosing import Choose, greedy, without
from llmc.compiler.generation.decoder import Decoder, Input, pad_left
from llmc.compiler.generation.encoder_decoder import EncoderDecoder, pad_right
from llmc.compiler.generation.inputs import read_inputs
from llmc.compiler.generation.onnx_decoder import open_decoder, open_encoder
from llmc.compiler.generation.tokenizer import FOLDER, Tokenizer
from llmc.compiler.loaders import HALVES, Feeds
from llmc.passes.graph import Array

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Speed:
    """How fast a run was, in tokens of all prompts together."""

    prompt_tokens: int = 0
    """Frames where a prompt is sound."""
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    unit: str = "tokens"
    """Of the prompt."""

    def __str__(self) -> str:
        prompt = self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0
        line = f"prompt: {self.prompt_tokens} {self.unit}, {prompt:.0f} {self.unit}/s"
        if self.decode_seconds:
            line += f"; answer: {self.new_tokens} tokens, {self.new_tokens / self.decode_seconds:.1f} tokens/s"
        return line


@dataclass
class Generator:
    """A decoder, alone or with its encoder, and its tokenizer, ready for prompts."""

    decoder: Decoder | EncoderDecoder
    tokenizer: Tokenizer
    limit: int
    """The most new tokens."""
    choose: Choose = greedy
    raw: bool = False
    """Prompts go in as they are, without the chat template."""
    reads: Sequence[Input] = ()
    """What the encoder reads, where there is one."""
    speed: Speed = field(default_factory=Speed)

    def stream(self, prompt: str | Feeds) -> Iterator[str]:
        """The answer to one prompt, a text or what the encoder reads, piece by piece."""
        feeds = self._fed([prompt]) if isinstance(prompt, str) else prompt
        return self.tokenizer.stream(token for (token,) in self._tokens(feeds) if token is not None)

    def answers(self, prompts: Sequence[str] | Feeds) -> list[str]:
        """The answers to several prompts, texts or what the encoder reads, generated side by side."""
        feeds = prompts if isinstance(prompts, Mapping) else self._fed(prompts)
        kept: list[list[int]] = [[] for _ in next(iter(feeds.values()))]
        for tokens in self._tokens(feeds):
            for row, token in zip(kept, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return [self.tokenizer.decode(row) for row in kept]

    def read(self, files: Sequence[Path]) -> tuple[Feeds, list[str]]:
        """What the encoder reads, from .npz or .wav files, and what each prompt is called. Raises LlmcError."""
        if not self.reads:
            raise LlmcError("the model is a decoder, which reads text: give --prompt or --prompts in place of --input")
        return read_inputs(files, self.reads, self.tokenizer.folder)

    def _fed(self, prompts: Sequence[str]) -> Feeds:
        if self.reads and self.reads[0].name != "input_ids":
            raise LlmcError(
                f"the model reads {self.reads[0].name}, not text: give --input FILE, a .wav file of sound, or an .npz "
                "file of arrays"
            )
        chat = self.tokenizer.has_chat and not self.raw
        encoded = [self.tokenizer.encode(prompt, chat) for prompt in prompts]
        if self.reads:
            return pad_right(encoded)
        ids, mask = pad_left(encoded)
        return {"input_ids": ids, "attention_mask": mask}

    def _tokens(self, feeds: Feeds) -> Iterator[list[int | None]]:
        """The next token of each prompt, None from its end on."""
        running = [True] * len(next(iter(feeds.values())))
        size = self._size(feeds)
        started = time.perf_counter()
        for number, tokens in enumerate(self._stream(feeds), start=1):
            running = [on and int(token) not in self.tokenizer.stops for on, token in zip(running, tokens, strict=True)]
            self._count(number, size, sum(running), time.perf_counter() - started)
            if not any(running):
                return
            yield [int(token) if on else None for on, token in zip(running, tokens, strict=True)]
            if number == self.limit:
                return
            started = time.perf_counter()

    def _stream(self, feeds: Feeds) -> Iterator[Array]:
        choose = without(self.choose, *self.tokenizer.barred)
        if isinstance(self.decoder, EncoderDecoder):
            return self.decoder.generate(feeds, choose)
        return self.decoder.generate(feeds["input_ids"], feeds["attention_mask"], choose)

    def _size(self, feeds: Feeds) -> int:
        """Of all prompts together: tokens, or frames of sound."""
        if "attention_mask" in feeds:
            return int(feeds["attention_mask"].sum())
        self.speed.unit = "frames"
        first = next(iter(feeds.values()))
        return len(first) * int(first.shape[-1])

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
    folder = tokenizer or (artifact if artifact.is_dir() else artifact.parent) / FOLDER
    if is_pair(artifact):
        both, reads = open_pair(artifact, words := Tokenizer(folder))
        return Generator(both, words, limit, choose, raw, reads)
    model = artifact / "model.onnx" if artifact.is_dir() else artifact
    return Generator(open_decoder(model), Tokenizer(folder), limit, choose, raw)


def is_pair(artifact: Path) -> bool:
    """Whether it is of an encoder-decoder: two graphs in one folder."""
    return all((artifact / half / "model.onnx").is_file() for half in HALVES)


def open_pair(artifact: Path, tokenizer: Tokenizer) -> tuple[EncoderDecoder, Sequence[Input]]:
    """The encoder-decoder in an artifact, and what its encoder reads. Raises LlmcError where it cannot run here."""
    encoder, decoder = (artifact / half / "model.onnx" for half in HALVES)
    encode, reads = open_encoder(encoder)
    return EncoderDecoder(encode, open_decoder(decoder), tokenizer.opening), reads


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
