"""Checkpoints in 16 bits as float32 models: what torch computes is what it computes of a model that was cast, the
weights stay in their files, and whoever reads one finds its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmc.compiler.loaders import load, widened
from llmc.compiler.loaders.checkpoint import open_checkpoint
from llmc.compiler.loaders.huggingface import _load_model
from llmc.compiler.loaders.mapped import MappedFiles, PlacedWeights
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.loaders.signature import run_torch, signature_of
from llmc.compiler.loaders.widened import Widened
from llmc.passes.graph import constants, load_values

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "LARGE", 1024)


def make(architecture: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, architecture)
    return kind(kind.config_class(**settings)).eval()


def placed(graph: Any) -> dict[str, PlacedWeights]:
    return {c.name: c._values for c in constants(graph) if isinstance(c._values, PlacedWeights)}


def cast(folder: Path, kind: Any) -> Any:
    """The model as transformers casts it."""
    with quiet():
        return kind.from_pretrained(folder, dtype=torch.float32).eval()


def shards(model: Any, folder: Path, dtypes: tuple[torch.dtype, ...]) -> Path:
    """The model in several files with an index, its tensors of these types in turn."""
    for index, parameter in enumerate(model.parameters()):
        parameter.data = parameter.data.to(dtypes[index % len(dtypes)])
    with quiet():
        model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


MIXED = (torch.bfloat16, torch.float32, torch.float16)


@pytest.mark.parametrize(
    ("dtypes", "tied"),
    [
        (MIXED, True),
        pytest.param(MIXED, False, marks=pytest.mark.slow),
        pytest.param((torch.bfloat16,), False, marks=pytest.mark.slow),
        pytest.param((torch.bfloat16,), True, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_decoder(tmp_path: Path, dtypes: tuple[torch.dtype, ...], tied: bool) -> None:
    """Exact: both sides compute the same in float32, in the same order."""
    made = make("LlamaForCausalLM", **LLAMA, tie_word_embeddings=tied)
    folder = shards(made, tmp_path / "shards", dtypes)
    loaded = load(str(folder))
    exact = cast(folder, transformers.LlamaForCausalLM)
    large = {name for name, tensor in exact.named_parameters() if tensor.nbytes >= 1024}
    found = placed(loaded.graph)
    assert {name.removesuffix(".T") for name in found} == large
    values = dict(exact.named_parameters())
    for name, held in found.items():
        expected = values[name.removesuffix(".T")].detach().numpy()
        np.testing.assert_array_equal(held.load(), expected.T if name.endswith(".T") else expected, strict=True)
        np.testing.assert_array_equal(np.concatenate(list(held.blocks())), held.load())
    assert len({held.place.file for held in found.values()}) > 2
    rotary = next(c for c in constants(loaded.graph) if "inv_freq" in c.name)
    assert np.array_equal(load_values(rotary).ravel(), exact.model.rotary_emb.inv_freq.numpy())
    checkpoint = open_checkpoint(folder)
    model, weights, _ = _load_model(checkpoint, "text-generation", False)
    signature = signature_of(model, "text-generation", None, folder)
    feeds = {
        "input_ids": np.array([[3, 9, 11]]),
        "position_ids": np.array([[2, 3, 4]]),
        "attention_mask": np.ones((1, 5), np.int64),
        **{v.name: np.ones((1, 2, 2, 8), np.float32) for v in signature.inputs if v.name.startswith("past")},
    }
    ours = weights.settled(lambda: run_torch(model, signature, feeds))
    theirs = run_torch(exact, signature_of(exact, "text-generation", None, folder), feeds)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], strict=True)
    assert model.dtype == torch.float32
    assert not any(stand_in.filled for stand_in in weights._stand_ins.values())


def mixtral(folder: Path) -> Path:
    made = make("MixtralForCausalLM", **LLAMA, num_local_experts=4, num_experts_per_tok=2)
    return shards(made, folder / "shards", (torch.bfloat16,))


def test_experts_that_transformers_stacks(tmp_path: Path) -> None:
    """Their files have each expert by itself: made in memory, as float32, as ever."""
    folder = mixtral(tmp_path)
    exact = cast(folder, transformers.MixtralForCausalLM)
    model, _, missing = _load_model(open_checkpoint(folder), "text-generation", False)
    assert not missing
    stacked = {name: p for name, p in model.named_parameters() if ".experts." in name}
    assert stacked
    for name, expected in exact.named_parameters():
        if name in stacked:
            assert torch.equal(stacked[name], expected)


@pytest.mark.slow
def test_an_export_with_such_experts(tmp_path: Path) -> None:
    found = load(str(mixtral(tmp_path))).graph
    assert any(".experts." in c.name for c in constants(found))
    assert not any(".experts." in name for name in placed(found))


class Peeking(torch.nn.Module):
    """Reads the weight of a module without calling it, beside one that it calls; folds a scale into its own."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.called = torch.nn.Linear(32, 32, bias=False, dtype=dtype)
        self.read = torch.nn.Linear(32, 32, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x) @ self.read.weight.T


def test_whoever_reads_a_weight_past_its_module_finds_it(tmp_path: Path) -> None:
    source = Peeking(torch.bfloat16)
    stored = torch.cat([source.called.weight, source.read.weight]).detach()
    (tmp_path / "w").write_bytes(stored.view(torch.int16).numpy().tobytes())
    mapped = np.memmap(tmp_path / "w", np.int16, "r")
    with quiet():
        halves = torch.from_numpy(mapped).view(torch.bfloat16).view(2, 32, 32)
    model = Peeking()
    for module, half in zip((model.called, model.read), halves, strict=True):
        module.weight = torch.nn.Parameter(half, requires_grad=False)
    wanted = {"called.weight": torch.float32, "read.weight": torch.float32}
    weights = Widened(model, MappedFiles(tmp_path, [tmp_path / "w"]), wanted)
    x = torch.arange(64, dtype=torch.float32).view(2, 32)
    expected = x @ source.called.weight.float().T @ source.read.weight.float().T
    assert not model(x).any()  # as nobody has been told
    assert torch.equal(weights.settled(lambda: model(x)), expected)
    assert [stand_in.filled for stand_in in weights._stand_ins.values()] == [False, True]
    assert torch.equal(model(x), expected)
    calls = []

    def fails_without() -> torch.Tensor:
        calls.append(1)
        found = model.called.weight.abs().sum()
        if not found:
            raise ZeroDivisionError
        return found

    assert weights.settled(fails_without) == source.called.weight.float().abs().sum()
    assert len(calls) == 2
    with pytest.raises(KeyError):
        weights.settled(lambda: {}["nothing"])
