"""Hugging Face and sentence-transformers folders: loaded whole or not at all, exported, and proved against torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler.cache.keys import code_digest, environment
from llmc.compiler.cache.memory import NOTHING, Memory, WeightRef
from llmc.compiler.digest import SourceFiles
from llmc.compiler.errors import LlmcError, TwoGraphsError
from llmc.compiler.generation.decoder import LONGEST
from llmc.compiler.loaders import HALVES, Cache, Feeds, Half, Loaded
from llmc.compiler.loaders.checkpoint import Checkpoint, open_checkpoint
from llmc.compiler.loaders.encoder_decoder import DIMENSIONS
from llmc.compiler.loaders.hub import SETTINGS
from llmc.compiler.loaders.images import configuration
from llmc.compiler.loaders.mapped import MappedFiles, Place, PlacedWeights
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.loaders.sentence_transformers import Head, is_sentence_transformer, read_head, transformer_folder
from llmc.compiler.loaders.tasks import (
    SENTENCE_EMBEDDING,
    SPEECH_RECOGNITION,
    TASKS,
    TWO_GRAPHS,
    check_task,
    infer_task,
    task_of,
)
from llmc.compiler.loaders.widened import Widened, read_as_stored
from llmc.compiler.progress import Progress
from llmc.compiler.progress import quiet as silent
from llmc.passes.graph import Array, Graph, to_structure

if TYPE_CHECKING:
    from llmc.compiler.loaders.signature import Signature


def load_huggingface(
    folder: Path,
    *,
    task: str | None = None,
    opset: int | None = None,
    cache: Cache = "growing",
    half: Half | None = None,
    trust_remote_code: bool = False,
    memory: Memory = NOTHING,
    progress: Progress = lambda _: None,
) -> Loaded:
    """Load a folder with config.json and .safetensors weights, or a sentence-transformers folder.

    Inputs of text models are input_ids, attention_mask and, where the model tells segments apart, token_type_ids, all
    int64[batch, sequence]; of decoders with a `cache` also past_key_values.N.key and .value, [batch, heads,
    past_sequence, width], and an attention_mask over past and new tokens; of vision models pixel_values[batch,
    channels, height, width], with a fixed image size and in the weights' dtype. An export that `memory` knows is not
    made again, and torch then imported only where the source model is to run. Raises LlmcError with the reason where
    the model cannot be loaded or exported.
    """
    pooled = is_sentence_transformer(folder)
    if task is not None:
        check_task(task, pooled)
    checkpoint = open_checkpoint(transformer_folder(folder) if pooled else folder)
    task = task or _inferred(checkpoint, pooled)
    _check_half(checkpoint, task, half)
    head = read_head(folder) if task == SENTENCE_EMBEDDING else None
    _require_torch(folder)
    model = _TorchModel(checkpoint, task, head, cache, half, trust_remote_code, progress)
    wanted, read = (task, opset, cache, half), SourceFiles(progress)
    remembered = _Exports(
        NOTHING if trust_remote_code else memory,  # code from elsewhere is in no key
        folder,
        checkpoint.folder,
        wanted,
        read,
    )
    tokenizer = next((place for place in (folder, checkpoint.folder) if (place / "tokenizer.json").is_file()), None)
    settings = [checkpoint.folder / "config.json", *(head.files if head else ())]
    files = [*settings, *checkpoint.weights, *([tokenizer / "tokenizer.json"] if tokenizer else [])]
    named = {file.relative_to(folder).as_posix(): file for file in files}
    about, graph, cached = remembered.recall(lambda: _export(model, opset, named, read))
    return Loaded(
        graph=graph,
        kind="huggingface",
        name=folder.resolve().name,
        digest=about["digest"],
        files=read.digests,
        task=task,
        half=half,
        elsewhere=DIMENSIONS if half is not None else frozenset(),
        exporter=about["exporter"],
        limits=about["limits"],
        least=about["least"],
        vocabulary=about["vocabulary"],
        tokenizer=tokenizer,
        processor=next((place for place in (folder, checkpoint.folder) if configuration(place)), None),
        reference=model.run,
        notes=[*_dtype_notes(checkpoint), *about["notes"]],
        cached=cached,
    )


def _inferred(checkpoint: Checkpoint, pooled: bool) -> str:
    if checkpoint.encoder_decoder and "num_mel_bins" in checkpoint.config:
        return SPEECH_RECOGNITION
    return infer_task(checkpoint.architecture, pooled)


def _check_half(checkpoint: Checkpoint, task: str, half: Half | None) -> None:
    """Raises LlmcError where the model does not make two graphs of which one is wanted, or the other way round."""
    if not checkpoint.encoder_decoder:
        if half is not None or (task in TWO_GRAPHS and task_of(checkpoint.architecture or "") != SPEECH_RECOGNITION):
            raise LlmcError(f"{checkpoint.folder} is no encoder-decoder: it makes one graph")
        return
    kind = checkpoint.config.get("model_type")
    if task not in TWO_GRAPHS:
        raise LlmcError(
            f"{checkpoint.folder} is an encoder-decoder ({kind}), and llmc takes those that generate text: "
            f"give one that was saved with its head (…ForConditionalGeneration), not for {task}"
        )
    if half is None:
        raise TwoGraphsError(
            f"{checkpoint.folder} is an encoder-decoder ({kind}), which makes two graphs: say which one is wanted "
            f"({' or '.join(HALVES)}), as model.half in the recipe or with --set model.half={HALVES[-1]}"
        )


def _require_torch(folder: Path) -> None:
    for name in ("onnxscript", "torch", "transformers"):
        if find_spec(name) is None:
            raise LlmcError(
                f"{folder} is a Hugging Face model, and reading it needs {name}: pip install 'llmc-compiler[hf]'"
            )


@dataclass
class _TorchModel:
    """The source model, read when it is needed first."""

    checkpoint: Checkpoint
    task: str
    head: Head | None
    cache: Cache
    half: Half | None
    trust_remote_code: bool
    progress: Progress

    @cached_property
    def loaded(self) -> tuple[Any, Widened, frozenset[str]]:
        """The torch model, ready for inference, its weights, and the names of what the checkpoint did not have."""
        self.progress("reading weights")
        with quiet():
            import onnxscript  # noqa: F401
        return _load_model(self.checkpoint, self.task, self.trust_remote_code)

    @cached_property
    def signature(self) -> Signature:
        """Its inputs and outputs."""
        from llmc.compiler.loaders.encoder_decoder import decoder_signature, encoder_signature
        from llmc.compiler.loaders.signature import signature_of

        if self.half is not None:
            return (encoder_signature if self.half == "encoder" else decoder_signature)(self.loaded[0])
        return signature_of(self.loaded[0], self.task, self.head, self.checkpoint.folder, self.cache)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run it on one set of inputs."""
        from llmc.compiler.loaders.signature import run_torch

        model, weights, _ = self.loaded
        return weights.settled(lambda: run_torch(model, self.signature, feeds))


def _export(
    source: _TorchModel, opset: int | None, files: Mapping[str, Path], read: SourceFiles
) -> tuple[dict[str, Any], Graph]:
    """What is known of the model, and its graph."""
    from llmc.compiler.loaders.apart import APART_FROM, exporter_apart
    from llmc.compiler.loaders.torch_export import export

    model, weights, missing = source.loaded
    checkpoint, signature = source.checkpoint, source.signature
    large = sum(path.stat().st_size for path in checkpoint.weights) >= APART_FROM
    exporter = exporter_apart(replace(source, progress=silent)) if large else None
    exported = export(model, signature, source.task, opset, source.progress, weights, exporter)
    random = sorted(missing & exported.parameters)
    if random:
        raise LlmcError(
            f"{checkpoint.folder} lacks weights that {type(model).__name__} needs for {source.task}, such as "
            f"'{random[0]}' ({len(random)} in all): it was saved from {checkpoint.architecture or 'another class'}"
        )
    if signature.longest is not None:
        exported.graph.metadata[LONGEST] = str(signature.longest)
    about = {
        "digest": read.digest(files),
        "exporter": f"torch.onnx dynamo, {exported.rung}",
        "limits": signature.limits,
        "least": signature.least,
        "vocabulary": signature.bounds.get("input_ids"),
        "notes": list(signature.notes),
    }
    return about, exported.graph


@dataclass(frozen=True)
class _Exports:
    """Earlier exports of a folder: found by all of its files that a model can be made of, and how it is wanted."""

    memory: Memory
    folder: Path
    weights: Path
    """The folder of the weights' files."""
    wanted: tuple[object, ...]
    read: SourceFiles

    def recall(self, make: Callable[[], tuple[dict[str, Any], Graph]]) -> tuple[Mapping[str, Any], Graph, bool]:
        """What `make` gives, or gave before; and whether that was before."""
        if self.memory.store is None:
            return *make(), False
        patterns = (*SETTINGS, "*.safetensors")
        files = {file.relative_to(self.folder).as_posix(): file for p in patterns for file in self.folder.rglob(p)}
        code = code_digest("llmc.compiler.loaders.torch_export"), code_digest(__name__)
        parts = (self.read.digest(files), self.wanted, code, environment("huggingface"))
        found = self.memory.find_state("load", *parts, origins=self._placed)
        if found is not None:
            return found[0]["about"], found[1].graph, True
        about, graph = make()
        structure = to_structure(graph)
        placed = {name: held for name, held in structure.weights.items() if isinstance(held, PlacedWeights)}
        state = self.memory.state(structure, stays=placed, files=self.read.digests)
        places = {name: asdict(held.place) for name, held in placed.items()}
        self.memory.keep_state("load", parts, {"about": about, "places": places}, state)
        return about, state.graph, False

    def _placed(self, value: Mapping[str, Any], weights: Mapping[str, WeightRef]) -> dict[str, PlacedWeights]:
        """The weights that stand in files of the folder, as a record says."""
        return {
            name: PlacedWeights(self.weights, Place(**place), weights[name].dtype, weights[name].shape)
            for name, place in value["places"].items()
        }


def _load_model(checkpoint: Checkpoint, task: str, trust_remote_code: bool) -> tuple[Any, Widened, frozenset[str]]:
    """The torch model, ready for inference, its weights, and the names of what the checkpoint did not have."""
    import torch
    import transformers

    model_class = _model_class(checkpoint, task, trust_remote_code)
    settings = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    widens = checkpoint.dtype == "float32" and checkpoint.stored != ("F32",)
    with quiet(), _no_loading_bar(), read_as_stored(widens) as wanted:
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
    weights = Widened(model, MappedFiles(checkpoint.folder, checkpoint.weights), wanted)
    return model.eval(), weights, frozenset(info["missing_keys"])


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
