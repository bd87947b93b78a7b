"""Encoder-decoders, as two graphs: what these take and give.

One that is compiled, and generates: tests/compiler/generation/test_encoder_decoder.py. Tokens of every family:
tests/test_families.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import HALVES, Loaded, load
from llmc.compiler.loaders.quiet import quiet

BART = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""With fewer layers in the decoder."""


def save(folder: Path) -> None:
    with quiet():
        torch.manual_seed(0)
        config = transformers.BartConfig(**BART)
        transformers.BartForConditionalGeneration(config).eval().save_pretrained(folder)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    folder = tmp_path_factory.mktemp("saved")
    save(folder)
    return {half: load(str(folder), half=half) for half in HALVES}


def ordered(size: int | str | None) -> int | str | None:
    """A sum with its parts in alphabetical order."""
    return " + ".join(sorted(size.split(" + "))) if isinstance(size, str) else size


@pytest.mark.slow
def test_inputs_and_outputs(halves: dict[str, Loaded]) -> None:
    layers = [f"{number}.{side}" for number in range(1) for side in ("key", "value")]
    own, cross = ([name.replace(".", f".{half}.") for name in layers] for half in ("decoder", "encoder"))
    encoder, decoder = (halves[half].graph for half in HALVES)
    read, total = ["batch", "encoder_sequence"], "past_sequence + sequence"
    heads = ["batch", 4, "encoder_sequence", 8]
    assert {t.name: list(t.shape) for t in encoder.inputs} == {"input_ids": read, "attention_mask": read}
    assert {t.name: list(t.shape) for t in encoder.outputs} == {
        "last_hidden_state": [*read, 32],
        **{f"present.{name}": heads for name in cross},
    }
    assert {t.name: list(t.shape) for t in decoder.inputs} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", total],
        "encoder_attention_mask": read,
        **{f"past_key_values.{name}": ["batch", 4, "past_sequence", 8] for name in own},
        **{f"past_key_values.{name}": heads for name in cross},
    }
    assert {t.name: [*map(ordered, t.shape)] for t in decoder.outputs} == {
        "logits": ["batch", "sequence", 99],
        **{f"present.{name}": ["batch", 4, total, 8] for name in own},
    }
    assert halves["encoder"].limits == {"encoder_sequence": 64}
    assert set(halves["decoder"].limits.values()) == {64}
    assert {loaded.task for loaded in halves.values()} == {"text2text-generation"}
    assert len({loaded.digest for loaded in halves.values()}) == 1


@pytest.mark.slow
def test_no_half_holds_weights_of_the_other(halves: dict[str, Loaded]) -> None:
    names = {half: {t.name for node in loaded.graph.nodes for t in node.inputs} for half, loaded in halves.items()}
    assert not any("encoder.layers" in name and "decoder" not in name for name in names["decoder"])
    of_decoder = {name for name in names["encoder"] if "decoder" in name}
    assert of_decoder
    assert all("encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name for name in of_decoder)


def test_a_half_must_be_named(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(LlmcError, match=r"encoder-decoder \(bart\), which makes two graphs.*encoder or decoder"):
        load(str(tmp_path))


def test_what_has_no_halves(tmp_path: Path) -> None:
    with quiet():
        config = transformers.BartConfig(**BART, num_labels=2)
        transformers.BartForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
        bert = transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(LlmcError, match=r"that generate text.*not for text-classification"):
        load(str(tmp_path / "classifier"), half="encoder")
    with pytest.raises(LlmcError, match="no encoder-decoder: it makes one graph"):
        load(str(tmp_path / "bert"), half="encoder")
