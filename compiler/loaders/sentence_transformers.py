"""sentence-transformers folders: what `modules.json` puts behind the transformer goes into the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.checkpoint import read_json

if TYPE_CHECKING:
    import torch

OUTPUTS = ("sentence_embedding",)
"""[batch, hidden], pooled, and normalized where the model says so."""


@dataclass(frozen=True)
class Head:
    """Makes sentence embeddings of token embeddings."""

    modes: tuple[str, ...]
    """Pooling modes, in the order in which their results are joined: 'cls', 'max', 'mean'."""
    normalize: bool
    files: tuple[Path, ...]
    """The configuration files that say so."""

    def __call__(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, hidden] and a [batch, sequence] mask of 0 and 1 → [batch, hidden * modes]."""
        import torch

        pooled = torch.cat([_POOLING[mode](tokens, mask) for mode in self.modes], dim=-1)
        return torch.nn.functional.normalize(pooled, p=2, dim=1) if self.normalize else pooled


def is_sentence_transformer(folder: Path) -> bool:
    """Whether the folder says how to make sentence embeddings."""
    return (folder / "modules.json").is_file()


def transformer_folder(folder: Path) -> Path:
    """Where the transformer itself stands in a sentence-transformers folder. Raises LlmcError."""
    return folder / _modules(folder)[0][1]


def read_head(folder: Path) -> Head:
    """The pooling and normalization of a sentence-transformers folder. Raises LlmcError for any other module."""
    steps = _modules(folder)[1:]
    kinds = [kind for kind, _ in steps]
    if kinds not in (["Pooling"], ["Pooling", "Normalize"]):
        raise LlmcError(
            f"{folder / 'modules.json'}: llmc takes a Transformer, a Pooling and perhaps a Normalize, "
            f"not {', '.join(['Transformer', *kinds])}; task 'feature-extraction' takes the transformer alone"
        )
    config = folder / steps[0][1] / "config.json"
    return Head(_pooling_modes(config), "Normalize" in kinds, (folder / "modules.json", config))


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(class name, folder) of each module, in order; the first is the Transformer."""
    path = folder / "modules.json"
    try:
        found = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in read_json(path, list)]
    except (TypeError, LookupError) as error:
        raise LlmcError(f"{path} does not list modules with a 'type' and a 'path'") from error
    if not found or found[0][0] != "Transformer":
        raise LlmcError(f"{path}: the first module is {found[0][0] if found else 'missing'}, llmc takes a Transformer")
    for _, inner in found:
        if not (folder / inner).resolve().is_relative_to(folder.resolve()):
            raise LlmcError(f"{path}: module folder '{inner}' is outside the model's folder")
    return found


def _pooling_modes(path: Path) -> tuple[str, ...]:
    config = read_json(path, dict)
    prefix = "pooling_mode_"
    flags = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean"}
    named = config.get("pooling_mode")
    asked = named if isinstance(named, list) else [named] if named else []
    asked += [key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value is True]
    modes = {flags.get(mode, mode) for mode in asked}
    unknown = sorted(str(mode) for mode in modes - set(_POOLING))
    if unknown or not modes:
        found = f"'{unknown[0]}'" if unknown else "none"
        raise LlmcError(f"{path}: pooling by {', '.join(_POOLING)} is taken, and {found} is asked for")
    return tuple(mode for mode in _POOLING if mode in modes)


def _cls(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return tokens[:, 0]


def _max(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    import torch

    return tokens.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(tokens.dtype).min).amax(1)


def _mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    # At least 1, where sentence-transformers has 1e-9 (0 in float16): they differ for no mask of zeros and ones.
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


_POOLING: dict[str, Callable[[Any, Any], Any]] = {"cls": _cls, "max": _max, "mean": _mean}
