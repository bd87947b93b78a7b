"""Exports of whole models, compared with the same weights run by transformers itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Feeds, Loaded, load
from llmc.compiler.loaders.checkpoint import Checkpoint
from llmc.compiler.loaders.huggingface import _model_class, load_huggingface
from llmc.compiler.loaders.mapped import PlacedWeights
from llmc.compiler.loaders.quiet import quiet
from llmc.passes.graph import Array, constants, digest, load_values, metadata, module_of, shape_of, to_model

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # large enough that a lost mask or position shows
}
DISTILBERT = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.3}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "patch_size": 8}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
MODERNBERT = {**TEXT, **{f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}}
IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
SMALL = {**TEXT, "num_hidden_layers": 1}
"""Where it is not the export that is tested."""
Save = Callable[[Any], Path]


def make(name: str, settings: dict[str, Any]) -> Any:
    """A model of transformers class `name` with random weights, the same each time."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    with quiet():
        return model_class(model_class.config_class(**settings)).eval()


def feeds_for(loaded: Loaded) -> dict[str, Array]:
    """Inputs at sizes that the loader does not try itself; rows after the first end in padding."""
    rng = np.random.default_rng(7)
    pixels = loaded.graph.inputs[0]
    if pixels.name == "pixel_values":
        return {pixels.name: rng.standard_normal((4, *pixels.shape[1:])).astype(pixels.dtype)}
    lengths = np.array([[17], [9], [12], [2]])
    values = {
        IDS: rng.integers(2, 99, (4, 17)),
        MASK: (np.arange(17) < lengths).astype(np.int64),
        TYPES: rng.integers(0, 2, (4, 17)),
    }
    return {tensor.name: values[tensor.name] for tensor in loaded.graph.inputs}


def run_onnx(loaded: Loaded, feeds: Feeds) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(to_model(loaded.graph).SerializeToString())
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


def run_eager(name: str, folder: Path, feeds: Feeds, outputs: list[str]) -> dict[str, Array]:
    """The checkpoint in transformers, with its plainest attention."""
    with quiet(), torch.inference_mode():
        model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()
        found = model(**{key: torch.tensor(value) for key, value in feeds.items()})
    return {output: found[output].numpy() for output in outputs}


def close(found: dict[str, Array], reference: dict[str, Array], tolerance: float) -> None:
    assert list(found) == list(reference)
    for name, array in reference.items():
        assert found[name].shape == array.shape
        assert np.abs(found[name] - array).max() <= tolerance * np.abs(array).max(), name


FEATURES = ["last_hidden_state"]
CASES: dict[str, tuple[Any, ...]] = {
    "BertModel": (TEXT, "feature-extraction", [IDS, MASK, TYPES], FEATURES, "opset 23, sdpa"),
    "DistilBertForQuestionAnswering": (
        DISTILBERT,
        "question-answering",
        [IDS, MASK],
        ["start_logits", "end_logits"],
        "opset 23, sdpa",
    ),
    "GPT2LMHeadModel": (GPT2, "text-generation", [IDS, MASK], ["logits"], "opset 24, sdpa"),
    "ViTModel": ({**VIT, "image_size": 32}, "feature-extraction", ["pixel_values"], FEATURES, "opset 23, sdpa"),
    "ResNetForImageClassification": (RESNET, "image-classification", ["pixel_values"], ["logits"], "opset 20, eager"),
}
SLOW_CASES: dict[str, tuple[Any, ...]] = {
    "RobertaForSequenceClassification": (
        {**TEXT, "type_vocab_size": 1},
        "text-classification",
        [IDS, MASK],
        ["logits"],
        "opset 23, sdpa",
    ),
    "LlamaForCausalLM": (GROUPED, "text-generation", [IDS, MASK], ["logits"], "opset 24, sdpa"),
    "Qwen3ForCausalLM": (GROUPED, "text-generation", [IDS, MASK], ["logits"], "opset 24, sdpa"),
    "Gemma2ForCausalLM": (GROUPED, "text-generation", [IDS, MASK], ["logits"], "opset 20, eager"),
    "MixtralForCausalLM": (
        {**GROUPED, "num_local_experts": 4},
        "text-generation",
        [IDS, MASK],
        ["logits"],
        "opset 24, sdpa",
    ),
    "ModernBertModel": (MODERNBERT, "feature-extraction", [IDS, MASK], FEATURES, "opset 24, sdpa"),
    "MPNetForMaskedLM": (TEXT, "fill-mask", [IDS, MASK], ["logits"], "opset 23, eager"),
    "DebertaV2Model": (TEXT, "feature-extraction", [IDS, MASK], FEATURES, "opset 23, eager"),
}
EVERY = [
    *(pytest.param(name, *case[1:], id=name) for name, case in CASES.items()),
    *(pytest.param(name, *case[1:], id=name, marks=pytest.mark.slow) for name, case in SLOW_CASES.items()),
]


@pytest.fixture(scope="module")
def loaded_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Loaded]]:
    """The folder of a case's model, and what `load` makes of it."""

    @cache
    def loaded_case(name: str) -> tuple[Path, Loaded]:
        folder = tmp_path_factory.mktemp(name)
        with quiet():
            make(name, {**CASES, **SLOW_CASES}[name][0]).save_pretrained(folder)
        if "pixel_values" in {**CASES, **SLOW_CASES}[name][2]:
            (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}}))
        return folder, load(str(folder), cache="none")

    return loaded_case


@pytest.mark.parametrize(("name", "task", "inputs", "outputs", "exporter"), EVERY)
def test_export_gives_what_transformers_gives(
    loaded_case: Callable[[str], tuple[Path, Loaded]],
    name: str,
    task: str,
    inputs: list[str],
    outputs: list[str],
    exporter: str,
) -> None:
    folder, loaded = loaded_case(name)
    assert (loaded.kind, loaded.task) == ("huggingface", task)
    assert loaded.exporter == f"torch.onnx dynamo, {exporter}"
    assert [tensor.name for tensor in loaded.graph.inputs] == inputs
    assert [tensor.name for tensor in loaded.graph.outputs] == outputs
    first = ("batch", 3, 32, 32) if inputs == ["pixel_values"] else ("batch", "sequence")
    assert shape_of(loaded.graph.inputs[0]) == first
    assert all(tensor.shape[0] == "batch" for tensor in loaded.graph.outputs)
    feeds = feeds_for(loaded)
    reference = run_eager(name, folder, feeds, outputs)
    # Two layers of float32, in another order of operations: some 1e-6 is seen; a lost mask moves outputs by over 1e-2.
    close(run_onnx(loaded, feeds), reference, 1e-4)
    assert loaded.reference is not None
    close(loaded.reference(feeds), reference, 1e-4)


# One export, looked at from all sides


@pytest.fixture(scope="module")
def bert(loaded_case: Callable[[str], tuple[Path, Loaded]]) -> tuple[Path, Loaded]:
    return loaded_case("BertModel")


def test_weights_are_read_from_the_checkpoint_s_file(bert: tuple[Path, Loaded]) -> None:
    folder, loaded = bert
    stored = load_file(folder / "model.safetensors")
    shared = {c.name for c in constants(loaded.graph) if isinstance(c._values, PlacedWeights)}
    for constant in constants(loaded.graph):
        if constant.name in shared:
            values = load_values(constant)
            assert isinstance(values.base, np.memmap)
            turned = constant.name.endswith(".T")
            expected = stored[constant.name.removesuffix(".T")]
            np.testing.assert_array_equal(values, expected.T if turned else expected)
    products = {
        f"encoder.layer.{i}.attention.self.{name}.weight.T" for i in (0, 1) for name in ("query", "key", "value")
    }
    assert products | {"embeddings.word_embeddings.weight"} <= shared


def test_nodes_keep_their_module_and_nothing_else(bert: tuple[Path, Loaded]) -> None:
    nodes = bert[1].graph.nodes
    assert {"embeddings", "encoder.layer.1.attention.self.value", "encoder.layer.0.output.dense"} <= set(
        map(module_of, nodes)
    )
    assert {key for node in nodes for key in metadata(node)} == {"pkg.torch.onnx.name_scopes"}
    assert not [node.name for node in nodes if "hook" in module_of(node) or node.doc_string]


def test_facts_of_a_text_model(bert: tuple[Path, Loaded]) -> None:
    _, loaded = bert
    assert (loaded.limits, loaded.vocabulary, loaded.tokenizer, loaded.notes) == ({"sequence": 40}, 99, None, [])


def test_digest_covers_configuration_and_weights(bert: tuple[Path, Loaded]) -> None:
    folder, loaded = bert
    lines = subprocess.run(
        ["sha256sum", "config.json", "model.safetensors"], cwd=folder, capture_output=True, check=True
    )
    listed = subprocess.run(["sha256sum"], input=lines.stdout, capture_output=True, check=True).stdout
    assert loaded.digest == listed.decode().split()[0]


def test_same_graph_in_another_process_and_not_a_word_printed(bert: tuple[Path, Loaded]) -> None:
    folder, loaded = bert
    code = (
        "from llmc.compiler.loaders import load; from llmc.passes.graph import digest\n"
        f"print(digest(load({str(folder)!r}).graph), end='')"
    )
    found = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == digest(loaded.graph)
    assert found.stderr == ""


# MiniLM

SENTENCES = [
    "The ship left the harbour before dawn.",
    "A vessel sailed out of port early in the morning.",
    "Add a pinch of salt, and stir.",
    "Why?",
]


@pytest.fixture(scope="module")
def sentences(minilm: Path) -> dict[str, Array]:
    with quiet():
        tokens = transformers.AutoTokenizer.from_pretrained(minilm)(SENTENCES, padding=True, return_tensors="np")
    return {name: tokens[name] for name in (IDS, MASK, TYPES)}


@pytest.mark.slow  # tests/test_minilm.py has the same export, and what is compiled of it
def test_minilm(minilm: Path, sentences: dict[str, Array]) -> None:
    phases: list[str] = []
    loaded = load(str(minilm), progress=phases.append)
    exporting = ["reading weights", "exporting at opset 23 with sdpa attention", "comparing with torch"]
    assert phases == [*exporting, "reading the model's files"]
    assert (loaded.name, loaded.task, loaded.tokenizer) == ("model", "sentence-embedding", minilm)
    assert (loaded.limits, loaded.vocabulary) == ({"sequence": 512}, 30522)
    assert [shape_of(t) for t in loaded.graph.outputs] == [("batch", 384)]
    found = run_onnx(loaded, sentences)

    tokens = run_eager("BertModel", minilm, sentences, FEATURES)["last_hidden_state"]
    mean = np.stack([row[kept == 1].mean(0) for row, kept in zip(tokens, sentences[MASK], strict=True)])
    pooled = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    # Six layers of float32 in another order of operations: some 1e-6 is seen.
    close(found, {"sentence_embedding": pooled}, 1e-5)
    similarity = found["sentence_embedding"] @ found["sentence_embedding"].T
    assert similarity[0, 1] > 0.6 > 0.2 > similarity[0, 2], "the first two sentences mean the same"


def test_sentence_transformers_folder_as_another_task(bert: tuple[Path, Loaded], tmp_path: Path) -> None:
    for file in bert[0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer", "path": ""}]')
    loaded = load(str(tmp_path), task="feature-extraction", opset=20)
    assert (loaded.exporter, loaded.graph.opset) == ("torch.onnx dynamo, opset 20, eager", 20)
    assert [tensor.name for tensor in loaded.graph.outputs] == FEATURES


# Weights


def test_missing_weights_are_never_made_up(bert: tuple[Path, Loaded]) -> None:
    with pytest.raises(
        LlmcError, match=r"lacks weights .* 'classifier\.bias' \(2 in all\): it was saved from BertModel"
    ):
        load(str(bert[0]), task="text-classification")


def test_missing_weights_that_no_output_needs(save: Save) -> None:
    loaded = load(str(save(make("BertForMaskedLM", SMALL))), task="feature-extraction")  # has no pooler
    assert [tensor.name for tensor in loaded.graph.outputs] == FEATURES


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
def test_half_precision_checkpoints(save: Save, dtype: torch.dtype) -> None:
    folder = save(make("BertModel", TEXT).to(dtype))
    loaded = load(str(folder))
    kept = dtype == torch.float16
    assert loaded.graph.outputs[0].dtype == (np.float16 if kept else np.float32)
    assert loaded.notes == ([] if kept else ["weights stored as BF16 were read as float32, to be verified on the CPU"])
    feeds = feeds_for(loaded)
    with quiet(), torch.inference_mode():
        exact = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
        reference = exact(**{name: torch.tensor(array) for name, array in feeds.items()}).last_hidden_state.numpy()
    found = run_onnx(loaded, feeds)["last_hidden_state"].astype(np.float32)
    # float16 rounds every result by 2^-11, over some fifty operations in a row; float32 as above.
    close({"y": found}, {"y": reference}, 2e-2 if kept else 1e-4)


@pytest.mark.parametrize(
    ("architecture", "task", "expected"),
    [
        ("GPT2LMHeadModel", "text-generation", transformers.GPT2LMHeadModel),
        ("GPT2LMHeadModel", "feature-extraction", transformers.AutoModel),
        ("BertModel", "sentence-embedding", transformers.BertModel),
        ("BertForMaskedLM", "sentence-embedding", transformers.AutoModel),
        ("BertForMaskedLM", "text-classification", transformers.AutoModelForSequenceClassification),
        (None, "fill-mask", transformers.AutoModelForMaskedLM),
    ],
)
def test_class_that_serves_the_task(architecture: str | None, task: str, expected: Any) -> None:
    checkpoint = Checkpoint(Path("model"), {"architectures": [architecture]}, (), "float32", ())
    assert _model_class(checkpoint, task, trust_remote_code=False) is expected


def test_from_the_hubs_cache(bert: tuple[Path, Loaded], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "0123abc"
    snapshot.symlink_to(bert[0])
    monkeypatch.setattr("llmc.compiler.loaders.hub.fetch", lambda *_, **__: snapshot)
    monkeypatch.setattr(
        "llmc.compiler.loaders.huggingface.load_huggingface", lambda *_, **__: replace(bert[1], notes=[])
    )
    loaded = load("owner/name@main")
    assert (loaded.name, loaded.notes) == ("owner/name@main", ["owner/name@main was read at revision 0123abc"])


def test_weights_of_another_shape(save: Save) -> None:
    folder = save(make("BertModel", TEXT))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(LlmcError, match=r"(?i)shape|size"):
        load_huggingface(folder)


# Code from the model's folder


@pytest.fixture
def foreign(save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint whose class stands in its own folder, and leaves a mark when it is imported."""
    folder = save(make("BertModel", SMALL))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["OwnModel"], "auto_map": {"AutoModel": "modeling_own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import BertModel\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnModel(BertModel):\n    pass\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder


def test_foreign_code_does_not_run_unasked(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"needs its own Python code to run .*model\.trust_remote_code"):
        load_huggingface(foreign)
    assert not (tmp_path / "ran").exists()


def test_foreign_code_runs_when_trusted(foreign: Path, tmp_path: Path) -> None:
    loaded = load_huggingface(foreign, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert [tensor.name for tensor in loaded.graph.outputs] == FEATURES


def test_architecture_that_does_not_exist(bert: tuple[Path, Loaded], tmp_path: Path) -> None:
    config = json.loads((bert[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    (tmp_path / "model.safetensors").symlink_to(bert[0] / "model.safetensors")
    with pytest.raises(LlmcError, match=r"NoSuchModel is not part of transformers"):
        load(str(tmp_path))
