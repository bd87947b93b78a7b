"""Tasks: which transformers class a model is loaded as, and which of its outputs the graph gives."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.errors import LlmcError


@dataclass(frozen=True)
class Task:
    """One use of a model."""

    suffixes: tuple[str, ...]
    """Endings of the class names that serve it."""
    auto_class: str
    """The transformers class that loads another architecture for it."""
    outputs: tuple[str, ...]
    """Fields of the model's output that become the graph's outputs, in order."""


SENTENCE_EMBEDDING = "sentence-embedding"
"""What a sentence-transformers folder is for: pooling and normalization stand in the graph."""

TEXT_GENERATION = "text-generation"
TEXT_TO_TEXT = "text2text-generation"
SPEECH_RECOGNITION = "automatic-speech-recognition"
TWO_GRAPHS = (TEXT_TO_TEXT, SPEECH_RECOGNITION)
"""What encoder-decoders are for."""
IMAGE_TEXT = "zero-shot-image-classification"
"""How well pictures go with texts."""
GENERATING = (TEXT_GENERATION, *TWO_GRAPHS)
"""What gives token after token: its tokenizer goes along."""

TASKS = {
    TEXT_GENERATION: Task(("ForCausalLM", "LMHeadModel"), "AutoModelForCausalLM", ("logits",)),
    TEXT_TO_TEXT: Task(("ForConditionalGeneration", "MTModel"), "AutoModelForSeq2SeqLM", ("logits",)),
    SPEECH_RECOGNITION: Task(("ForCTC",), "AutoModelForSpeechSeq2Seq", ("logits",)),
    "fill-mask": Task(("ForMaskedLM",), "AutoModelForMaskedLM", ("logits",)),
    "text-classification": Task(("ForSequenceClassification",), "AutoModelForSequenceClassification", ("logits",)),
    "token-classification": Task(("ForTokenClassification",), "AutoModelForTokenClassification", ("logits",)),
    "question-answering": Task(
        ("ForQuestionAnswering",), "AutoModelForQuestionAnswering", ("start_logits", "end_logits")
    ),
    "image-classification": Task(("ForImageClassification",), "AutoModelForImageClassification", ("logits",)),
    "image-segmentation": Task(("ForSemanticSegmentation",), "AutoModelForSemanticSegmentation", ("logits",)),
    "object-detection": Task(("ForObjectDetection",), "AutoModelForObjectDetection", ("logits", "pred_boxes")),
    IMAGE_TEXT: Task(
        ("CLIPModel", "SiglipModel"),
        "AutoModelForZeroShotImageClassification",
        ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"),
    ),
    "feature-extraction": Task(("Model",), "AutoModel", ("last_hidden_state",)),
    SENTENCE_EMBEDDING: Task((), "AutoModel", ("last_hidden_state",)),
}


def task_of(architecture: str) -> str | None:
    """The task that a transformers class serves, by the ending of its name."""
    return next((name for name, task in TASKS.items() if architecture.endswith(task.suffixes)), None)


def infer_task(architecture: str | None, sentence_transformer: bool) -> str:
    """The task that a checkpoint was saved for. Raises LlmcError where its class does not say."""
    if sentence_transformer:
        return SENTENCE_EMBEDDING
    if architecture is None:
        raise LlmcError(
            f"config.json names no architecture: say in model.task what the model is for ({', '.join(TASKS)})"
        )
    task = task_of(architecture)
    if task is not None:
        return task
    raise LlmcError(f"what {architecture} is for is not known: say it in model.task ({', '.join(TASKS)})")


def check_task(task: str, sentence_transformer: bool) -> None:
    """Raises LlmcError for a task that does not exist, or that the source cannot serve."""
    if task not in TASKS:
        raise LlmcError(f"unknown task '{task}': it is one of {', '.join(TASKS)}")
    if task == SENTENCE_EMBEDDING and not sentence_transformer:
        raise LlmcError(f"task '{task}' needs a sentence-transformers folder, whose modules.json says how to pool")
