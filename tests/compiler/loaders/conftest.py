"""Models to load: tiny random ones saved by transformers, checkpoints written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from llmc.compiler.loaders.quiet import quiet


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    """Save a transformers model; gives its folder."""

    def save(model: Any) -> Path:
        folder = tmp_path / "saved"
        with quiet():
            model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint by hand: `checkpoint(config, weights)`; its folder has no more than that."""

    def checkpoint(config: dict[str, Any] | None = None, weights: dict[str, np.ndarray] | None = None) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        if weights is not None:
            safetensors.numpy.save_file(weights, folder / "model.safetensors")
        return folder

    return checkpoint
