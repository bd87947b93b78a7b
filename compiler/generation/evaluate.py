"""How well a decoder predicts a text, and how far it is from the model that it was compiled from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel

from llmc.compiler.errors import LlmcError
from llmc.compiler.generation.choosing import greedy
from llmc.compiler.generation.decoder import LONGEST, Decoder, Input
from llmc.compiler.generation.onnx_decoder import open_decoder
from llmc.compiler.generation.tokenizer import FOLDER, Tokenizer
from llmc.compiler.loaders import Loaded, load
from llmc.compiler.session import Session
from llmc.passes.graph import Array

if TYPE_CHECKING:
    from rich.console import Console

Logits = Callable[[Array], Array]
"""int64 [1, length] token ids → [1, length, vocabulary]."""
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

    Raises LlmcError where the artifact is no decoder, or the text cannot be read.
    """
    model = artifact / "model.onnx" if artifact.is_dir() else artifact
    decoder = open_decoder(model)
    tokens = _tokens(text, Tokenizer(tokenizer or model.parent / FOLDER))
    progress("predicting the text")
    likelihood = Likelihood()
    for ids in windows(tokens, window):
        likelihood.add(decoder.logits(ids), ids)
    compared = None
    if against is not None:
        source = load(against, progress=progress)
        progress(f"comparing with {source.name}")
        compared = _compare(decoder, _source_decoder(source), tokens, window, source.name)
    return Evaluation(text=text.name, tokens=likelihood.tokens, perplexity=likelihood.perplexity, against=compared)


def _tokens(text: Path, tokenizer: Tokenizer) -> list[int]:
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LlmcError(f"{text} cannot be read as UTF-8 text: {error}") from error
    tokens = tokenizer.encode(content, chat=False) if content else []
    if len(tokens) < 2:
        raise LlmcError(f"{text} has {len(tokens)} tokens: to predict one takes two")
    return tokens


def _source_decoder(source: Loaded) -> Decoder:
    inputs = [Input(tensor.name, np.dtype(tensor.dtype), tuple(tensor.shape)) for tensor in source.graph.inputs]
    names, longest = [tensor.name for tensor in source.graph.outputs], source.graph.metadata.get(LONGEST)
    return Decoder(inputs, names, source.reference or Session(source.graph).run, int(longest) if longest else None)


def _compare(decoder: Decoder, source: Decoder, tokens: Sequence[int], window: int, name: str) -> Against:
    divergence, agreed, count = 0.0, 0, 0
    for ids in windows(tokens, window):
        expected, found = log_probabilities(source.logits(ids)), log_probabilities(decoder.logits(ids))
        divergence += float((np.exp(expected) * (expected - found)).sum())
        agreed += int((expected.argmax(axis=-1) == found.argmax(axis=-1)).sum())
        count += ids.shape[1]
    prompts = [ids for ids in islice(windows(tokens, PROMPT_TOKENS), PROMPTS) if ids.shape[1] == PROMPT_TOKENS]
    same = sum(_answer(decoder, ids) == _answer(source, ids) for ids in prompts)
    return Against(
        model=name,
        kl_divergence=divergence / count,
        top1_agreement=agreed / count,
        same_answers=same,
        answers=len(prompts),
    )


def _answer(decoder: Decoder, ids: Array) -> list[int]:
    stream = decoder.generate(ids, np.ones_like(ids), greedy)
    return [int(token) for (token,) in islice(stream, ANSWER_TOKENS)]


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
