"""Decoders with a cache: what transformers' `generate` makes, token for token, in every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from llmc.compiler.errors import LlmcError
from llmc.compiler.generation.choosing import greedy
from llmc.compiler.generation.decoder import Decoder, Input, pad_left
from llmc.compiler.loaders import Loaded, load
from llmc.compiler.loaders.quiet import quiet
from llmc.passes.graph import Array, shape_of, to_model

TOKENS = 64
PLAIN = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8}
WINDOW = {**GROUPED, "sliding_window": 8}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHORT = {key: PLAIN[key] for key in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id")}
FAMILIES: dict[str, dict[str, Any]] = {"LlamaForCausalLM": GROUPED, "GPT2LMHeadModel": GPT2}
SLOW_FAMILIES: dict[str, dict[str, Any]] = {
    "GPTNeoXForCausalLM": PLAIN,
    "OPTForCausalLM": {**PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "BloomForCausalLM": {**SHORT, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": {**PLAIN, "multi_query": True, "new_decoder_architecture": False},
    "MistralForCausalLM": WINDOW,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": GROUPED,
    "GemmaForCausalLM": GROUPED,
    "Gemma2ForCausalLM": {**WINDOW, "query_pre_attn_scalar": 8},
    "Gemma3ForCausalLM": {**WINDOW, "query_pre_attn_scalar": 8},
    "Phi3ForCausalLM": GROUPED,
    "SmolLM3ForCausalLM": GROUPED,
    "Olmo2ForCausalLM": GROUPED,
    "GraniteForCausalLM": GROUPED,
    "Glm4ForCausalLM": GROUPED,
    "GptOssForCausalLM": {**EXPERTS, "sliding_window": 8},
    "MixtralForCausalLM": EXPERTS,
    "Qwen3MoeForCausalLM": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
EVERY = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FAMILIES)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Loaded]]:
    """The torch model of a family, and what `load` makes of its folder."""

    @cache
    def family(name: str) -> tuple[Any, Loaded]:
        model_class = getattr(transformers, name)
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        with quiet():
            settings = {**FAMILIES, **SLOW_FAMILIES}[name]
            model = model_class(model_class.config_class(**settings, tie_word_embeddings=False)).eval()
            for parameter in model.parameters():  # as initialized, logits hardly differ, and tokens do not vary
                if parameter.ndim > 1:
                    parameter.data.normal_(0.0, 0.25)
            model.generation_config.eos_token_id = None  # no answer ends before its last token
            model.save_pretrained(folder)
        return model, load(str(folder))

    return family


def decoder(loaded: Loaded) -> Decoder:
    session = onnxruntime.InferenceSession(to_model(loaded.graph).SerializeToString())
    names = [output.name for output in session.get_outputs()]
    inputs = [Input(t.name, np.dtype(t.dtype), shape_of(t) or ()) for t in loaded.graph.inputs]
    return Decoder(inputs, names, lambda feeds: dict(zip(names, session.run(None, feeds), strict=True)))


def generated(model: Any, ids: Array, mask: Array) -> Array:
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "pad_token_id": 0}
    with quiet(), torch.inference_mode():
        found = model.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **settings)
    tokens: Array = found.numpy()[:, ids.shape[1] :]
    return tokens


@pytest.mark.parametrize("lengths", [(11,), (11, 4, 7)], ids=["one", "padded"])
@pytest.mark.parametrize("name", EVERY)
def test_greedy_tokens(family: Callable[[str], tuple[Any, Loaded]], name: str, lengths: tuple[int, ...]) -> None:
    model, loaded = family(name)
    rng = np.random.default_rng(3)
    ids, mask = pad_left([rng.integers(2, 99, length).tolist() for length in lengths])
    expected = generated(model, ids, mask)
    assert len(np.unique(expected)) > 4, "tokens that hardly vary show nothing"
    found = np.stack(list(islice(decoder(loaded).generate(ids, mask, greedy), TOKENS)), axis=1)
    np.testing.assert_array_equal(found, expected)


def test_inputs_and_outputs(family: Callable[[str], tuple[Any, Loaded]]) -> None:
    _, loaded = family("LlamaForCausalLM")
    cached = ["batch", 2, "past_sequence", 8]
    present = ["batch", 2, "past_sequence + sequence", 8]
    layers = [f"{number}.{part}" for number in range(2) for part in ("key", "value")]
    assert {tensor.name: list(tensor.shape) for tensor in loaded.graph.inputs} == {
        "input_ids": ["batch", "sequence"],
        "position_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "past_sequence + sequence"],
        **{f"past_key_values.{name}": cached for name in layers},
    }
    assert {tensor.name: list(tensor.shape) for tensor in loaded.graph.outputs} == {
        "logits": ["batch", "sequence", 99],
        **{f"present.{name}": present for name in layers},
    }
    assert loaded.limits == {"sequence": 128, "past_sequence": 128, "past_sequence + sequence": 128}


def test_state_that_is_no_cache(tmp_path: Path) -> None:
    with quiet():
        config = transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)
        transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(LlmcError, match=r"set model\.cache to none"):
        load(str(tmp_path))
