"""How well a decoder predicts a text, and how far it is from the model that it was compiled from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel

from llmc.compiler.cache.memory import open_memory
from llmc.compiler.cache.store import DamagedError
from llmc.compiler.data.labelled import read_labelled
from llmc.compiler.errors import LlmcError, TwoGraphsError
from llmc.compiler.generation.choosing import greedy
from llmc.compiler.generation.decoder import LONGEST, Decoder, Input, Run
from llmc.compiler.generation.encoder_decoder import EncoderDecoder, pad_right
from llmc.compiler.generation.generate import is_pair, open_pair
from llmc.compiler.generation.onnx_decoder import open_decoder
from llmc.compiler.generation.tokenizer import FOLDER, Tokenizer
from llmc.compiler.loaders import HALVES, Loaded, load
from llmc.compiler.session import Session
from llmc.passes.graph import Array

if TYPE_CHECKING:
    from rich.console import Console

PROMPTS = 8
PROMPT_TOKENS, ANSWER_TOKENS = 16, 32
"""Of the greedy answers that are compared."""


class Against(BaseModel):
    """A decoder beside the model that it is compared with."""

    model: str
    kl_divergence: float
    """Mean over tokens, in nats, of what is lost by predicting with this decoder in place of the model."""
    top1_agreement: float
    """Share of tokens whose likeliest successor is the same."""
    same_answers: int
    answers: int
    """Greedy ones, `ANSWER_TOKENS` long."""


class Evaluation(BaseModel):
    """What `llmc eval` found."""

    text: str
    tokens: int
    """Predicted ones."""
    perplexity: float
    against: Against | None = None


@dataclass
class Likelihood:
    """Running sums over predicted tokens."""

    nats: float = 0.0
    tokens: int = 0

    def add(self, logits: Array, ids: Array) -> None:
        """[1, length, vocabulary] logits of [1, length] ids: each but the first is predicted by those before it."""
        logs = log_probabilities(logits[0, :-1])
        self.nats -= float(np.take_along_axis(logs, ids[0, 1:, None], axis=-1).sum())
        self.tokens += ids.shape[1] - 1

    @property
    def perplexity(self) -> float:
        """e to the mean negative log-likelihood of a token, in nats."""
        return math.exp(self.nats / self.tokens)


def log_probabilities(logits: Array) -> Array:
    """Log-softmax over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    found: Array = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return found


@dataclass(frozen=True)
class Piece:
    """Tokens to predict."""

    ids: Array
    """int64 [1, length]; each but the first is predicted."""
    prompt: tuple[int, ...] = ()
    """What an encoder reads first, and the tokens are the answer to; nothing of a decoder that stands alone."""


@dataclass(frozen=True)
class Predictor:
    """A decoder, alone or with its encoder, asked for what comes next."""

    decoder: Decoder | EncoderDecoder

    def logits(self, piece: Piece) -> Array:
        """[1, length, vocabulary]: of what follows each token."""
        if isinstance(self.decoder, EncoderDecoder):
            return self.decoder.logits(pad_right([piece.prompt]), piece.ids)
        return self.decoder.logits(piece.ids)

    def answer(self, piece: Piece) -> list[int]:
        """`ANSWER_TOKENS` greedy tokens: to the prompt that an encoder reads, or behind the first `PROMPT_TOKENS`."""
        if isinstance(self.decoder, EncoderDecoder):
            stream = self.decoder.generate(pad_right([piece.prompt]), greedy)
        else:
            ids = piece.ids[:, :PROMPT_TOKENS]
            stream = self.decoder.generate(ids, np.ones_like(ids), greedy)
        return [int(token) for (token,) in islice(stream, ANSWER_TOKENS)]


def windows(tokens: Sequence[int], length: int) -> Iterator[Array]:
    """Tokens in pieces of `length`, int64 [1, length]; a last one of one token, which predicts none, is left out."""
    for start in range(0, len(tokens) - 1, length):
        yield np.array([tokens[start : start + length]], dtype=np.int64)


def evaluate(
    artifact: Path,
    text: Path,
    *,
    window: int = 256,
    against: str | None = None,
    tokenizer: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Perplexity of `text` under a compiled decoder, each `window` tokens by themselves; `against` a model, if given.

    Of an encoder-decoder, perplexity of the answers in a .jsonl or .tsv file: each `text_pair`, answer to its `text`.
    Raises LlmcError where the artifact is no decoder, or the text cannot be read.
    """
    words = Tokenizer(tokenizer or (artifact if artifact.is_dir() else artifact.parent) / FOLDER)
    predictor, pieces, prompts = _subject(artifact, text, words, window)
    progress("predicting the text")
    likelihood = Likelihood()
    for piece in pieces:
        likelihood.add(predictor.logits(piece), piece.ids)
    compared = None
    if against is not None:
        source, name = _source(against, words, progress)
        if type(source.decoder) is not type(predictor.decoder):
            raise LlmcError(f"{against} and {artifact} are not the same kind: one alone is an encoder-decoder")
        progress(f"comparing with {name}")
        compared = _compare(predictor, source, pieces, prompts, name)
    return Evaluation(text=text.name, tokens=likelihood.tokens, perplexity=likelihood.perplexity, against=compared)


def _subject(artifact: Path, text: Path, words: Tokenizer, window: int) -> tuple[Predictor, list[Piece], list[Piece]]:
    """What predicts, what it is to predict, and the prompts of greedy answers."""
    if not is_pair(artifact):
        tokens = _tokens(text, words)
        decoder = open_decoder(artifact / "model.onnx" if artifact.is_dir() else artifact)
        pieces = [Piece(ids) for ids in windows(tokens, window)]
        prompts = [Piece(ids) for ids in windows(tokens, PROMPT_TOKENS) if ids.shape[1] == PROMPT_TOKENS]
        return Predictor(decoder), pieces, prompts[:PROMPTS]
    both, reads = open_pair(artifact, words)
    if reads[0].name != "input_ids":
        raise LlmcError(
            f"{artifact} reads {reads[0].name}, not text: llmc eval measures models that read text; the report has how "
            "far both graphs are from the source model"
        )
    answers = _answers(text, words)
    return Predictor(both), answers, answers[:PROMPTS]


def _answers(path: Path, words: Tokenizer) -> list[Piece]:
    """What an encoder-decoder is to predict: the start token, and the tokens of an answer."""
    if path.suffix not in (".jsonl", ".tsv"):
        raise LlmcError(
            f"{path}: an encoder-decoder answers what it reads: give a .jsonl or .tsv file with text, and text_pair, "
            "its answer"
        )
    rows = read_labelled(path, pairs=True, labels=False)
    (start,) = (token for token in words.opening[:1] if isinstance(token, int))
    return [
        Piece(np.array([[start, *words.encode(row.pair or "", chat=False)]]), tuple(words.encode(row.text, chat=False)))
        for row in rows
    ]


def _tokens(text: Path, tokenizer: Tokenizer) -> list[int]:
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LlmcError(f"{text} cannot be read as UTF-8 text: {error}") from error
    tokens = tokenizer.encode(content, chat=False) if content else []
    if len(tokens) < 2:
        raise LlmcError(f"{text} has {len(tokens)} tokens: to predict one takes two")
    return tokens


def _source(model: str, words: Tokenizer, progress: Callable[[str], None]) -> tuple[Predictor, str]:
    """The model that is compared with, and its name."""
    while True:
        with suppress(DamagedError), open_memory() as memory:  # dropped by now: what it held is made anew
            try:
                source = load(model, memory=memory, progress=progress)
                return Predictor(_decoder(source)), source.name
            except TwoGraphsError:
                encoder, source = (load(model, half=half, memory=memory, progress=progress) for half in HALVES)
                return Predictor(EncoderDecoder(_run(encoder), _decoder(source), words.opening)), source.name


def _decoder(source: Loaded) -> Decoder:
    inputs = [Input(tensor.name, np.dtype(tensor.dtype), tuple(tensor.shape)) for tensor in source.graph.inputs]
    names, longest = [tensor.name for tensor in source.graph.outputs], source.graph.metadata.get(LONGEST)
    return Decoder(inputs, names, _run(source), int(longest) if longest else None)


def _run(source: Loaded) -> Run:
    return source.reference or Session(source.graph).run


def _compare(
    decoder: Predictor, source: Predictor, pieces: Sequence[Piece], prompts: Sequence[Piece], name: str
) -> Against:
    divergence, agreed, count = 0.0, 0, 0
    for piece in pieces:
        expected, found = (log_probabilities(model.logits(piece)) for model in (source, decoder))
        divergence += float((np.exp(expected) * (expected - found)).sum())
        agreed += int((expected.argmax(axis=-1) == found.argmax(axis=-1)).sum())
        count += piece.ids.shape[1]
    return Against(
        model=name,
        kl_divergence=divergence / count,
        top1_agreement=agreed / count,
        same_answers=sum(decoder.answer(piece) == source.answer(piece) for piece in prompts),
        answers=len(prompts),
    )


def render(found: Evaluation, console: Console) -> None:
    """Print an evaluation."""
    console.print(f"perplexity {found.perplexity:.4f} over {found.tokens} tokens of {found.text}", highlight=False)
    if found.against is not None:
        other = found.against
        console.print(
            f"against {other.model}: KL divergence {other.kl_divergence:.3g} nats a token, "
            f"same likeliest token {other.top1_agreement:.2%}, "
            f"same greedy answer {other.same_answers} of {other.answers}",
            highlight=False,
            markup=False,
        )
