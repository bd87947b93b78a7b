"""Hugging Face folders that cannot be loaded, each with its reason and without importing torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.checkpoint import open_checkpoint
from llmc.compiler.loaders.huggingface import load_huggingface
from llmc.compiler.loaders.tasks import infer_task

BERT: dict[str, Any] = {"architectures": ["BertModel"], "model_type": "bert"}
WEIGHTS = {"w": np.zeros(3, np.float32)}
Writer = Callable[..., Path]


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(LlmcError, match=reason) as caught:
        load_huggingface(folder)
    assert str(folder) in str(caught.value), "the message names the folder"


def test_weights_in_one_file(checkpoint: Writer) -> None:
    found = open_checkpoint(checkpoint(BERT, WEIGHTS))
    assert [path.name for path in found.weights] == ["model.safetensors"]
    assert (found.architecture, found.dtype, found.stored) == ("BertModel", "float32", ("F32",))


@pytest.mark.parametrize(
    ("arrays", "dtype"),
    [
        ([np.float16], "float16"),
        ([np.float16, np.int64], "float16"),
        ([np.float16, np.float32], "float32"),
        ([ml_dtypes.bfloat16], "float32"),
        ([np.int64], "float32"),
    ],
)
def test_weights_are_read_as_stored_where_the_cpu_runs_that(checkpoint: Writer, arrays: list[Any], dtype: str) -> None:
    weights = {str(number): np.zeros(3, kind) for number, kind in enumerate(arrays)}
    assert open_checkpoint(checkpoint(BERT, weights)).dtype == dtype


def test_weights_in_shards(checkpoint: Writer) -> None:
    folder = checkpoint(BERT, WEIGHTS)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    refused(folder, r"two\.safetensors is missing")
    (folder / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    assert [path.name for path in open_checkpoint(folder).weights] == [index.name, "one.safetensors", "two.safetensors"]


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', "[]", "no"])
def test_damaged_index(checkpoint: Writer, index: str) -> None:
    folder = checkpoint(BERT)
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, r"index\.json (does not say|is not)")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tf_model.h5"])
def test_pickled_weights(checkpoint: Writer, name: str) -> None:
    folder = checkpoint(BERT)
    (folder / name).write_bytes(b"\x80")
    refused(folder, rf"pickles only \({name}\).*save_pretrained")


def test_no_weights(checkpoint: Writer) -> None:
    refused(checkpoint(BERT), r"no weights: neither model\.safetensors")
    (checkpoint() / "consolidated.safetensors").write_bytes(b"")
    refused(checkpoint(), r"it has: consolidated\.safetensors")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"\x10\0\0\0\0\0\0\0{", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x04\0\0\0\0\0\0\0nope", "header cannot be read"),
        (b"\x02\0\0\0\0\0\0\0[]", "header cannot be read"),
        (b"<html>404</html>", "truncated, or not"),
    ],
)
def test_damaged_weights(checkpoint: Writer, content: bytes, reason: str) -> None:
    folder = checkpoint(BERT)
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, reason)


def test_truncated_weights(checkpoint: Writer) -> None:
    path = checkpoint(BERT, WEIGHTS) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(path.parent, r"truncated: it has \d+ bytes of \d+")


@pytest.mark.parametrize(
    ("name", "reason"), [("adapter_config.json", "PEFT adapter.*merge"), ("model_index.json", "diffusers pipeline")]
)
def test_folders_that_are_no_model(checkpoint: Writer, name: str, reason: str) -> None:
    folder = checkpoint()
    (folder / name).write_text("{}")
    refused(folder, reason)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({**BERT, "quantization_config": {"quant_method": "gptq"}}, r"quantized already \(gptq\)"),
        ({**BERT, "quantization_config": "fp8"}, r"quantized already \(fp8\)"),
        ({**BERT, "architectures": "BertModel"}, "names no architecture"),
        ({"model_type": "bert"}, "names no architecture: say in model.task what"),
        ({**BERT, "architectures": ["BertForMultipleChoice"]}, "what BertForMultipleChoice is for is not known"),
    ],
)
def test_configurations(checkpoint: Writer, config: dict[str, Any], reason: str) -> None:
    folder = checkpoint(config, WEIGHTS)
    with pytest.raises(LlmcError, match=reason):
        load_huggingface(folder)


def test_damaged_configuration(checkpoint: Writer) -> None:
    folder = checkpoint(None, WEIGHTS)
    refused(folder, r"has no config\.json")
    (folder / "config.json").write_text('{"architectures":')
    refused(folder, r"config\.json is not valid JSON")


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("GPT2LMHeadModel", "text-generation"),
        ("LlamaForCausalLM", "text-generation"),
        ("RobertaForMaskedLM", "fill-mask"),
        ("DistilBertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("ViTForImageClassification", "image-classification"),
        ("SegformerForSemanticSegmentation", "image-segmentation"),
        ("YolosForObjectDetection", "object-detection"),
    ],
)
def test_task_of_an_architecture(architecture: str, task: str) -> None:
    assert infer_task(architecture, sentence_transformer=False) == task


def test_unknown_task(checkpoint: Writer) -> None:
    with pytest.raises(LlmcError, match="unknown task 'translate': it is one of"):
        load_huggingface(checkpoint(BERT, WEIGHTS), task="translate")
    with pytest.raises(LlmcError, match="needs a sentence-transformers folder"):
        load_huggingface(checkpoint(BERT, WEIGHTS), task="sentence-embedding")
