"""Hugging Face and sentence-transformers folders: loaded whole or not at all, exported, and proved against torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Cache, Loaded, Progress, digest_files
from llmc.compiler.loaders.checkpoint import Checkpoint, open_checkpoint
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.loaders.sentence_transformers import is_sentence_transformer, read_head, transformer_folder
from llmc.compiler.loaders.tasks import SENTENCE_EMBEDDING, TASKS, check_task, infer_task, task_of


def load_huggingface(
    folder: Path,
    *,
    task: str | None = None,
    opset: int | None = None,
    cache: Cache = "growing",
    trust_remote_code: bool = False,
    progress: Progress = lambda _: None,
) -> Loaded:
    """Load a folder with config.json and .safetensors weights, or a sentence-transformers folder.

    Inputs of text models are input_ids, attention_mask and, where the model tells segments apart, token_type_ids, all
    int64[batch, sequence]; of decoders with a `cache` also past_key_values.N.key and .value, [batch, heads,
    past_sequence, width], and an attention_mask over past and new tokens; of vision models pixel_values[batch,
    channels, height, width], with a fixed image size and in the weights' dtype. Raises LlmcError with the reason
    where the model cannot be loaded or exported.
    """
    pooled = is_sentence_transformer(folder)
    if task is not None:
        check_task(task, pooled)
    checkpoint = open_checkpoint(transformer_folder(folder) if pooled else folder)
    task = task or infer_task(checkpoint.architecture, pooled)
    head = read_head(folder) if task == SENTENCE_EMBEDDING else None
    _require_torch(folder)
    from llmc.compiler.loaders.signature import signature_of
    from llmc.compiler.loaders.torch_export import export, run_torch

    progress("reading weights")
    model, missing = _load_model(checkpoint, task, trust_remote_code)
    signature = signature_of(model, task, head, checkpoint.folder, cache)
    exported = export(model, signature, task, opset, progress)
    random = sorted(missing & exported.parameters)
    if random:
        raise LlmcError(
            f"{checkpoint.folder} lacks weights that {type(model).__name__} needs for {task}, such as '{random[0]}' "
            f"({len(random)} in all): it was saved from {checkpoint.architecture or 'another class'}"
        )
    tokenizer = next((place for place in (folder, checkpoint.folder) if (place / "tokenizer.json").is_file()), None)
    settings = [checkpoint.folder / "config.json", *(head.files if head else ())]
    files = [*settings, *checkpoint.weights, *([tokenizer / "tokenizer.json"] if tokenizer else [])]
    return Loaded(
        graph=exported.graph,
        kind="huggingface",
        name=folder.resolve().name,
        digest=digest_files({file.relative_to(folder).as_posix(): file for file in files}),
        task=task,
        exporter=f"torch.onnx dynamo, {exported.rung}",
        limits=signature.limits,
        vocabulary=signature.bounds.get("input_ids"),
        tokenizer=tokenizer,
        reference=partial(run_torch, model, signature),
        notes=[*_dtype_notes(checkpoint), *signature.notes],
    )


def _require_torch(folder: Path) -> None:
    try:
        with quiet():
            import onnxscript  # noqa: F401
            import torch  # noqa: F401
            import transformers  # noqa: F401
    except ImportError as error:
        raise LlmcError(
            f"{folder} is a Hugging Face model, and reading it needs {error.name}: pip install 'llmc-compiler[hf]'"
        ) from error


def _load_model(checkpoint: Checkpoint, task: str, trust_remote_code: bool) -> tuple[Any, frozenset[str]]:
    """The torch model, ready for inference, and the names of what the checkpoint did not have."""
    import torch
    import transformers

    model_class = _model_class(checkpoint, task, trust_remote_code)
    settings = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with quiet(), _no_loading_bar():
        try:
            model, info = model_class.from_pretrained(
                checkpoint.folder,
                config=transformers.AutoConfig.from_pretrained(checkpoint.folder, **settings),
                dtype=getattr(torch, checkpoint.dtype),
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
        except Exception as error:  # whatever the configuration, the weights or the model's own code get wrong
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise LlmcError(f"transformers cannot load {checkpoint.folder}: {reason}") from error
    if info["mismatched_keys"]:
        name = sorted(info["mismatched_keys"])[0][0]
        raise LlmcError(f"{checkpoint.folder}: the shape of weight '{name}' is not what config.json asks for")
    return model.eval(), frozenset(info["missing_keys"])


def _model_class(checkpoint: Checkpoint, task: str, trust_remote_code: bool) -> Any:
    """The class that the checkpoint was saved from where that serves the task, else the one transformers has for it."""
    import transformers

    architecture = checkpoint.architecture
    suited = getattr(transformers, TASKS[task].auto_class)
    if architecture is None:
        return suited
    with quiet():
        named = getattr(transformers, architecture, None)
    if named is not None:
        wanted = "feature-extraction" if task == SENTENCE_EMBEDDING else task
        return named if task_of(architecture) == wanted else suited
    if "auto_map" not in checkpoint.config:
        raise LlmcError(f"{architecture} is not part of transformers {transformers.__version__}")
    if not trust_remote_code:
        raise LlmcError(
            f"{checkpoint.folder} needs its own Python code to run ({architecture} is not part of transformers): "
            "read that code, and if you trust it, set model.trust_remote_code to true in the recipe"
        )
    return suited


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _dtype_notes(checkpoint: Checkpoint) -> list[str]:
    kept = {"float32": ("F32",), "float16": ("F16",)}[checkpoint.dtype]
    if checkpoint.stored in (kept, ()):
        return []
    return [
        f"weights stored as {', '.join(checkpoint.stored)} were read as {checkpoint.dtype}, to be verified on the CPU"
    ]
