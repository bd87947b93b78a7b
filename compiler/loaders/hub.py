"""Models on the Hugging Face hub: fetched into the hub's own cache, small files first so that refusals come early."""

from __future__ import annotations

from pathlib import Path

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.checkpoint import read_config
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.loaders.sentence_transformers import is_sentence_transformer, transformer_folder

SETTINGS = ("*.json", "*.txt", "*.model", "*.py")
"""Configuration, tokenizers, and the code of models that bring their own."""


def fetch(source: str, *, offline: bool = False) -> Path:
    """The folder of 'owner/name' or 'owner/name@revision' in the hub's cache, downloaded where it is not there.

    Raises LlmcError where the hub cannot give it, or what it is cannot be loaded.
    """
    name, _, revision = source.partition("@")
    folder = _download(name, revision or None, SETTINGS, offline)
    inner = transformer_folder(folder) if is_sentence_transformer(folder) else folder
    read_config(inner)
    weights = (inner.relative_to(folder) / "model*.safetensors").as_posix()
    return _download(name, folder.name, (*SETTINGS, weights), offline)


def _download(name: str, revision: str | None, patterns: tuple[str, ...], offline: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise LlmcError(f"'{name}' does not exist here; to fetch it: pip install 'llmc-compiler[hf]'") from error
    try:
        with quiet(), disable_progress_bars():
            folder = snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
    except Exception as error:  # the hub's errors, the network's and the disk's have no class in common
        raise LlmcError(
            f"'{name}' is not a file or folder here, and the Hugging Face hub does not give it: {_reason(error)}"
        ) from error
    return Path(folder)


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access to it must be asked for on its page; then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no public model of that name (a private one needs `hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "it is not in the hub's cache, and the hub cannot be reached (or offline was asked for)"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
