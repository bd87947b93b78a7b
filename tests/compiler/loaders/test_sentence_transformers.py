"""Pooling and normalization, against NumPy, and what else modules.json may ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.sentence_transformers import Head, read_head, transformer_folder

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def folder(tmp_path: Path, modules: Any, pooling: dict[str, Any] | None = None) -> Path:
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    return tmp_path


def expected(mode: str, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    rows = [row[kept.astype(bool)] for row, kept in zip(tokens, mask, strict=True)]
    pools: dict[str, Callable[[np.ndarray], np.ndarray]]
    pools = {"cls": lambda row: row[0], "max": lambda row: row.max(0), "mean": lambda row: row.mean(0)}
    return np.stack([pools[mode](row) for row in rows])


@pytest.mark.parametrize("modes", [("cls",), ("max",), ("mean",), ("cls", "max", "mean")])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling(modes: tuple[str, ...], normalize: bool) -> None:
    import torch

    rng = np.random.default_rng(0)
    tokens = (
        rng.standard_normal((3, 5, 8), dtype=np.float32) - 2
    )  # mostly below 0, where a masked 0 would be the largest
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    reference = np.concatenate([expected(mode, tokens, mask) for mode in modes], axis=1)
    if normalize:
        reference /= np.linalg.norm(reference, axis=1, keepdims=True)
    found = Head(modes, normalize, ())(torch.tensor(tokens), torch.tensor(mask)).numpy()
    np.testing.assert_allclose(found, reference, rtol=1e-6)  # float32 sums of five values, in another order


def test_row_of_padding_alone_gives_zeros() -> None:
    import torch

    assert not Head(("mean",), False, ())(torch.ones(1, 4, 2), torch.zeros(1, 4)).any()


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode_cls_token": True, "include_prompt": True}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode": "mean"}, ("mean",)),
        ({"pooling_mode": ["cls", "mean"]}, ("cls", "mean")),
    ],
)
def test_modes(tmp_path: Path, config: dict[str, Any], modes: tuple[str, ...]) -> None:
    assert read_head(folder(tmp_path, [TRANSFORMER, POOLING], config)).modes == modes


def test_normalize(tmp_path: Path) -> None:
    assert read_head(folder(tmp_path, [TRANSFORMER, POOLING, NORMALIZE])).normalize


def test_minilm(minilm: Path) -> None:
    head = read_head(minilm)
    assert (head.modes, head.normalize) == (("mean",), True)
    assert transformer_folder(minilm) == minilm


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        (
            [TRANSFORMER, POOLING, {**NORMALIZE, "type": "sentence_transformers.models.Dense"}],
            "Transformer, Pooling, Dense",
        ),
        ([TRANSFORMER, NORMALIZE], "not Transformer, Normalize"),
        ([TRANSFORMER], "not Transformer"),
        ([{**TRANSFORMER, "type": "sentence_transformers.models.WordEmbeddings"}, POOLING], "WordEmbeddings"),
        ([{**TRANSFORMER, "path": "../elsewhere"}, POOLING], "outside the model's folder"),
        ([], "the first module is missing"),
        ([{"type": "x"}], "does not list modules"),
        ({}, "is not a JSON list"),
    ],
)
def test_other_modules(tmp_path: Path, modules: Any, reason: str) -> None:
    with pytest.raises(LlmcError, match=reason):
        read_head(folder(tmp_path, modules))


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"pooling_mode_weightedmean_tokens": True}, "weightedmean_tokens"), ({"pooling_mode_cls_token": False}, "none")],
)
def test_other_pooling(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(LlmcError, match=reason):
        read_head(folder(tmp_path, [TRANSFORMER, POOLING], config))
