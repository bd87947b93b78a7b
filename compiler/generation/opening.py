"""What the answers of an encoder-decoder begin with, as its checkpoint says."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmc.compiler.errors import LlmcError

Opening = Sequence[int | Collection[int]]
"""Tokens that every answer begins with, and that are no part of it; in the place of one, several of which the likeliest
is taken, as Whisper does with those that name the language it hears."""

Settings = Mapping[str, Any]
"""generation_config.json, and config.json where that says nothing."""


def opening(settings: Settings, folder: Path) -> Opening:
    """The start token, and those that must follow it. Raises LlmcError where `folder` names no start token."""
    start = settings.get("decoder_start_token_id", settings.get("bos_token_id"))
    if not isinstance(start, int):
        raise LlmcError(f"{folder}/config.json names no decoder_start_token_id, which every answer begins with")
    if "no_timestamps_token_id" in settings:
        return _whisper(start, settings, folder)
    forced = settings.get("forced_bos_token_id")
    return [start, forced] if isinstance(forced, int) else [start]


def _whisper(start: int, settings: Settings, folder: Path) -> Opening:
    """Start, language, task, and that no times are wanted: as far as the checkpoint tells them apart.

    The order, and what stands in for what is not said, are those of transformers (`_retrieve_init_tokens` of Whisper).
    """
    language, task = settings.get("language"), settings.get("task")
    spoken, tasks = settings.get("lang_to_id") or {}, settings.get("task_to_id") or {}
    forced = settings.get("forced_decoder_ids") if language is None and task is None else None
    tokens: list[Any] = [start, *(token for _, token in forced or ())]
    if language is not None:
        tokens.append(_language(language, spoken, folder))
    elif spoken and tokens[1:2] in ([], [None]):
        tokens[1:2] = [frozenset(spoken.values())]
    if task is not None or (language is not None and tasks):
        tokens.append(tasks[task or "transcribe"])
    silent = settings["no_timestamps_token_id"]
    tokens += [] if tokens[-1] == silent else [silent]
    return [token for token in tokens if token is not None]


def _language(language: str, spoken: Mapping[str, int], folder: Path) -> int:
    found = spoken.get(language, spoken.get(f"<|{language}|>"))
    if found is None:
        raise LlmcError(f"{folder}/generation_config.json: language '{language}' is none of {', '.join(spoken)}")
    return found
