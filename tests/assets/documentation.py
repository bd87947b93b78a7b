"""Text for training and measuring small language models: the documentation of the Python that runs this.

Two sources: the topics of `help()` (pydoc_data) and the docstrings of the standard library. Nothing of it is kept in
the repository, and the wording differs a little between versions of Python; which part is held out does not.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

LENGTH = 256
"""Tokens of a window."""
HELD_OUT = 20
"""One document in this many is kept from training."""
SHORTEST = 80
"""Characters; shorter docstrings say little ('See base class.')."""
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "turtledemo", "ensurepip"}


def training() -> list[str]:
    """The documents to learn from."""
    return [text for name, text in _documents() if not _held_out(name)]


def held_out() -> list[str]:
    """The documents that no training has seen."""
    return [text for name, text in _documents() if _held_out(name)]


# For a language model in a folder that has a tokenizer


def windows(texts: Sequence[str], folder: Path) -> list[np.ndarray[Any, Any]]:
    """Token ids int64 [1, LENGTH + 1] of the texts, one after another, each begun by the token that ends texts. Each
    window begins with the token that the one before ended with; what is left over at the end is left out."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    ids = np.array([i for text in texts for i in (end, *tokenizer.encode(text, add_special_tokens=False).ids)])
    return [ids[None, start : start + LENGTH + 1] for start in range(0, len(ids) - LENGTH, LENGTH)]


def samples(folder: Path, count: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Inputs to calibrate on: windows of LENGTH tokens, evenly spaced in the text to learn from."""
    seen = windows(training(), folder)
    return [_inputs(ids) for ids in seen[:: len(seen) // count][:count]]


def perplexity(run: Callable[[Any], np.ndarray[Any, Any]], windows: Sequence[np.ndarray[Any, Any]]) -> float:
    """Of what follows each token of the windows; `run` takes inputs and gives logits [1, LENGTH, vocabulary]."""
    nats, count = 0.0, 0
    for ids in windows:
        logits = run(_inputs(ids))[0].astype(np.float64)
        picked = np.take_along_axis(logits, ids[0, 1:, None], axis=-1)[:, 0]
        nats += float((np.log(np.exp(logits).sum(-1)) - picked).sum())
        count += len(picked)
    return float(np.exp(nats / count))


def _inputs(ids: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Of a window, but for its last token."""
    return {"input_ids": ids[:, :-1], "attention_mask": np.ones_like(ids[:, :-1])}


# Where the text comes from


def _held_out(name: str) -> bool:
    """By the name of the topic or module alone: no text moves from one side to the other with Python's version."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT == 0


def _documents() -> Iterator[tuple[str, str]]:
    """(topic or module, text) in a fixed order, each text once."""
    seen = set()
    for name, text in [*sorted(topics.items()), *_docstrings()]:
        text = text.strip()
        if len(text) >= SHORTEST and text not in seen:
            seen.add(text)
            yield name, text


def _docstrings() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if LEFT_OUT.isdisjoint(place.parts):
            for text in _docstrings_of(path):
                yield place.as_posix(), text


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a template of lib2to3, say
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield inspect.cleandoc(text)
