"""The tokenizer that an artifact carries: from prompts to token ids, and back piece by piece."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from llmc.compiler.errors import LlmcError
from llmc.compiler.generation.opening import Opening, opening
from llmc.compiler.loaders.chat import as_chat

FOLDER = "tokenizer"
"""Of an artifact."""
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What is taken along of a checkpoint: the tokenizer, how it wraps a chat, which tokens end a text, and how sound is
prepared."""


def copy_tokenizer(source: Path, artifact: Path) -> None:
    """Put the tokenizer files of the checkpoint `source` into the folder of an artifact."""
    place = artifact / FOLDER
    place.mkdir()
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, place / name)


class Tokenizer:
    """A tokenizer and what belongs to it. Raises LlmcError where the folder has none, or one that cannot be read."""

    def __init__(self, folder: Path) -> None:
        import tokenizers

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise LlmcError(f"there is no {file}: give --tokenizer DIR, a folder with tokenizer.json")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise LlmcError(f"{file} is not a tokenizer that the tokenizers library reads: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.folder = folder
        self.stops = _stops(folder)

    @cached_property
    def opening(self) -> Opening:
        """What an encoder-decoder's answers begin with. Raises LlmcError where the checkpoint does not say."""
        return opening(self._settings, self.folder)

    @cached_property
    def barred(self) -> tuple[frozenset[int], frozenset[int]]:
        """Tokens that are in no answer, and those that no answer begins with."""
        settings = _read(self.folder / "generation_config.json") or self._settings
        never, not_first = (settings.get(f"{name}suppress_tokens") for name in ("", "begin_"))
        return frozenset(never or ()), frozenset(not_first or ())

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return {**_read(self.folder / "config.json"), **_read(self.folder / "generation_config.json")}

    @property
    def has_chat(self) -> bool:
        """Whether the model was trained on chats, which its template wraps prompts in."""
        return (self.folder / "chat_template.jinja").is_file() or "chat_template" in _read(
            self.folder / "tokenizer_config.json"
        )

    def encode(self, prompt: str, chat: bool) -> list[int]:
        """Token ids of a prompt, as it stands or as a user's message of a chat. Raises LlmcError where none are."""
        text = as_chat(self.folder, prompt) if chat else prompt
        ids = self._tokenizer.encode(text, add_special_tokens=not chat).ids
        if not ids:
            raise LlmcError("the prompt has no tokens: give some text")
        return [int(token) for token in ids]

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without those that mark beginning and end."""
        return str(self._tokenizer.decode(tokens))

    def stream(self, tokens: Iterator[int]) -> Iterator[str]:
        """Pieces of text as tokens come; a character of several tokens comes once it is whole."""
        seen: list[int] = []
        told = ""
        for token in tokens:
            seen.append(token)
            text = self.decode(seen)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(told) :]
                told = text
        yield self.decode(seen)[len(told) :] if seen else ""


def _stops(folder: Path) -> frozenset[int]:
    """Tokens that end a text, as generation_config.json says, or else config.json."""
    for name in ("generation_config.json", "config.json"):
        found = _read(folder / name).get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError:
        return {}
    except ValueError as error:
        raise LlmcError(f"{path} is not valid JSON: {error}") from error
    return found if isinstance(found, dict) else {}
