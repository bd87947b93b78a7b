"""Encoder-decoders, as two graphs. The truth is transformers: outputs, and tokens of `generate`.

One that is compiled, and generates: tests/compiler/generation/test_encoder_decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.generation import GenerationMixin

from llmc.compiler.errors import LlmcError
from llmc.compiler.generation.choosing import greedy
from llmc.compiler.generation.decoder import Decoder, Input
from llmc.compiler.generation.encoder_decoder import EncoderDecoder, pad_right
from llmc.compiler.loaders import HALVES, Feeds, Loaded, load
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.session import Session
from llmc.passes.graph import shape_of

TOKENS = 32
FIRST = 1
"""The token that every answer begins with."""
SIZES = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": FIRST,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": FIRST, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "BART": ("BartForConditionalGeneration", 0.5, {**SIZES, "max_position_embeddings": 64}),
    "BART, fewer layers in the decoder": (
        "BartForConditionalGeneration",
        0.5,
        {**SIZES, "decoder_layers": 1, "max_position_embeddings": 64},
    ),
    "T5": ("T5ForConditionalGeneration", 0.25, T5),
    "T5 1.1": (
        "T5ForConditionalGeneration",
        0.5,
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "Marian": ("MarianMTModel", 1.0, {**SIZES, "max_position_embeddings": 64}),
    "Pegasus": ("PegasusForConditionalGeneration", 0.5, {**SIZES, "max_position_embeddings": 64}),
    "Whisper": (
        "WhisperForConditionalGeneration",
        1.0,
        {**SIZES, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
    ),
}
"""Class, spread of its random weights (as initialized, logits hardly differ, and tokens do not vary), configuration."""
SMALL = "BART, fewer layers in the decoder"
Pair = tuple[Any, dict[str, Loaded]]


def save(name: str, folder: Path) -> Any:
    kind, spread, settings = MODELS[name]
    with quiet():
        made = getattr(transformers, kind)
        model = made(made.config_class(**settings)).eval()
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0.0, spread)
        model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    @cache
    def pair(name: str) -> Pair:
        folder = tmp_path_factory.mktemp("saved")
        model = save(name, folder)
        return model, {half: load(str(folder), half=half) for half in HALVES}

    return pair


def prompts(model: Any, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    if model.main_input_name == "input_ids":
        return pad_right([rng.integers(3, 99, length).tolist() for length in (11, 4, 7)[:count]])
    return {"input_features": rng.standard_normal((count, 8, 40), np.float32)}


def generated(model: Any, feeds: Feeds) -> np.ndarray:
    """What `generate` makes; Whisper's own cuts sound into pieces first."""
    before = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=TOKENS, pad_token_id=0, decoder_start_token_id=FIRST
    )
    with quiet(), torch.inference_mode():
        found = GenerationMixin.generate(model, **{name: torch.from_numpy(value) for name, value in feeds.items()})
    model.generation_config = before
    tokens: np.ndarray = found.numpy()[:, 1:]
    return tokens


def in_onnx(halves: dict[str, Loaded]) -> EncoderDecoder:
    encoder, decoder = (halves[half].graph for half in HALVES)
    session = Session(decoder)
    inputs = [Input(t.name, np.dtype(t.dtype), shape_of(t) or ()) for t in decoder.inputs]
    return EncoderDecoder(Session(encoder).run, Decoder(inputs, session.outputs, session.run), [FIRST])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(pair: Callable[[str], Pair], name: str) -> None:
    model, halves = pair(name)
    both = in_onnx(halves)
    for count in (1, 3):
        feeds = prompts(model, count)
        expected = generated(model, feeds)
        assert count == 1 or len(np.unique(expected)) > 4, "tokens that hardly vary show nothing"
        found = np.stack(list(islice(both.generate(feeds, greedy), TOKENS)), axis=1)
        np.testing.assert_array_equal(found, expected, err_msg=f"{count} prompts")


def ordered(size: int | str | None) -> int | str | None:
    """A sum with its parts in alphabetical order."""
    return " + ".join(sorted(size.split(" + "))) if isinstance(size, str) else size


@pytest.mark.slow
def test_inputs_and_outputs(pair: Callable[[str], Pair]) -> None:
    _, halves = pair(SMALL)
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
def test_no_half_holds_weights_of_the_other(pair: Callable[[str], Pair]) -> None:
    _, halves = pair(SMALL)
    names = {half: {t.name for node in loaded.graph.nodes for t in node.inputs} for half, loaded in halves.items()}
    assert not any("encoder.layers" in name and "decoder" not in name for name in names["decoder"])
    of_decoder = {name for name in names["encoder"] if "decoder" in name}
    assert of_decoder
    assert all("encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name for name in of_decoder)


def test_a_half_must_be_named(tmp_path: Path) -> None:
    save(SMALL, tmp_path)
    with pytest.raises(LlmcError, match=r"encoder-decoder \(bart\), which makes two graphs.*encoder or decoder"):
        load(str(tmp_path))


def test_what_has_no_halves(tmp_path: Path) -> None:
    with quiet():
        config = transformers.BartConfig(**{**SIZES, "max_position_embeddings": 64}, num_labels=2)
        transformers.BartForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
        bert = transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(LlmcError, match=r"that generate text.*not for text-classification"):
        load(str(tmp_path / "classifier"), half="encoder")
    with pytest.raises(LlmcError, match="no encoder-decoder: it makes one graph"):
        load(str(tmp_path / "bert"), half="encoder")
