"""The hub: its cache without a network, what is asked of it, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.numpy
from huggingface_hub import constants, errors

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import load
from llmc.compiler.loaders.hub import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot folder of 'owner/name' in a hub cache of its own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    return snapshot


@pytest.mark.parametrize("source", ["owner/name", "owner/name@main", f"owner/name@{COMMIT}"])
def test_offline_takes_the_cache(cached: Path, source: str) -> None:
    safetensors.numpy.save_file({}, cached / "model.safetensors")
    assert fetch(source, offline=True) == cached


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("source", ["owner/other", "owner/name@v2"])
def test_offline_without_a_cache(source: str) -> None:
    with pytest.raises(LlmcError, match=r"is not a file or folder here, and .* not in the hub's cache"):
        load(source, offline=True)


def test_refused_before_weights_are_fetched(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cached / "adapter_config.json").write_text("{}")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _recorder(asked, cached))
    with pytest.raises(LlmcError, match="PEFT adapter"):
        fetch("owner/name")
    assert len(asked) == 1
    assert not [pattern for pattern in asked[0]["allow_patterns"] if "safetensors" in pattern]


def test_fetches_the_same_revision_twice_and_no_pickles(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _recorder(asked, cached))
    fetch("owner/name@main")
    assert [call["revision"] for call in asked] == ["main", COMMIT]
    assert "model*.safetensors" in asked[1]["allow_patterns"]
    assert not [p for call in asked for p in call["allow_patterns"] if p.endswith((".bin", ".pt", ".h5"))]


def _recorder(asked: list[dict[str, Any]], folder: Path) -> Any:
    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(folder)

    return download


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.RepositoryNotFoundError, "no public model of that name"),
        (errors.GatedRepoError, "must be asked for"),
        (errors.RevisionNotFoundError, "no such revision"),
    ],
)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, error: Any, reason: str) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error.__new__(error)  # made without the HTTP response that its constructor wants

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(LlmcError, match=reason):
        fetch("owner/name")


def test_disk_full_while_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(LlmcError, match="No space left on device"):
        fetch("owner/name")
