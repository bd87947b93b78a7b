"""The language model of tests/assets has learned its language, and loads wherever Hugging Face models do."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler import compile as run_compile
from llmc.compiler.loaders import load
from llmc.compiler.session import Session
from llmc.passes.graph import Array

LENGTH = 256
"""Tokens of a window: what the model was trained with."""


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def test_it_is_a_llama_in_small(tiny_llama: Path, model: Any) -> None:
    config = json.loads((tiny_llama / "config.json").read_text(encoding="utf-8"))
    assert config["num_key_value_heads"] == config["num_attention_heads"] // 2
    assert config["tie_word_embeddings"]
    assert 0.9e6 < model.num_parameters() < 1e6
    assert (tiny_llama / "model.safetensors").stat().st_size <= 2e6
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}


def test_its_tokenizer_gives_any_text_back(tokenizer: Any) -> None:
    text = "def größe(x):\n\treturn x['日本'] * 2  # 🙂\r\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.fixture(scope="module")
def windows(tokenizer: Any, documentation: Any) -> tuple[list[Array], str]:
    """Token ids int64 [1, LENGTH + 1] of text held out, each window beginning where the last one ended; the text."""
    text = "\n\n".join(documentation.held_out())[:12000]
    encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    ids = np.array([tokenizer.bos_token_id, *encoded])
    return [ids[None, start : start + LENGTH + 1] for start in range(0, len(ids) - 1, LENGTH)], text


def bits_per_byte(logits_of: Callable[[Array], Array], windows: tuple[list[Array], str]) -> float:
    nats = 0.0
    for ids in windows[0]:
        logits = logits_of(ids[:, :-1])[0].astype(np.float64)
        picked = np.take_along_axis(logits, ids[0, 1:, None], axis=-1)[:, 0]
        nats += float((np.log(np.exp(logits).sum(-1)) - picked).sum())
    return nats / math.log(2) / len(windows[1].encode())


def test_it_has_learned_its_language(model: Any, windows: tuple[list[Array], str]) -> None:
    """It takes fewer bits for text held out than LZMA does; after 30 of its 1500 steps it took 3.4 a byte."""
    import torch

    text = windows[1].encode()
    with torch.inference_mode():
        found = bits_per_byte(lambda ids: model(torch.from_numpy(ids)).logits.numpy(), windows)
    assert found < 8 * len(lzma.compress(text)) / len(text)


@pytest.mark.slow
def test_its_graph_predicts_as_well(tiny_llama: Path, model: Any, windows: tuple[list[Array], str]) -> None:
    import torch

    session = Session(load(str(tiny_llama), cache="none").graph)
    found = bits_per_byte(
        lambda ids: session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"], windows
    )
    with torch.inference_mode():
        expected = bits_per_byte(lambda ids: model(torch.from_numpy(ids)).logits.numpy(), windows)
    assert found == pytest.approx(expected, rel=1e-5)  # logits of up to 20 differ by float32's rounding, 1e-6 of them


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_an_engine_for_prompts_and_for_decoding(tiny_llama: Path, tmp_path: Path, cache: str) -> None:
    """By the recipe of docs/language-models.md, and with the passes that the page has for a cache in INT8."""
    text = (Path(__file__).parents[1] / "docs" / "language-models.md").read_text(encoding="utf-8")
    whole, passes = (block.split("```")[0] for block in text.split("```yaml\n")[1:3])
    if cache == "int8":
        model, _, rest = whole.partition("passes:\n")
        whole = model + passes + "\ntarget:\n" + rest.partition("target:\n")[2]
    recipe = tmp_path / "engine.yaml"
    recipe.write_text(whole, encoding="utf-8")
    report = run_compile(str(tiny_llama), recipe, tmp_path / "engine")
    target = report.target
    assert target is not None
    assert (tmp_path / "engine" / "model.engine").stat().st_size > 1e6
    assert [profile["sequence"] for profile in target.profiles] == [(1, 64, 128), (1, 1, 1)]
    assert target.facts["compute_capabilities"] == [80, 86, 89, 120]
    assert (target.facts["attention_nodes"], target.facts["attention_nodes_decomposed"]) == (4, 0)
    assert "past_length int64[]" in target.facts["inputs"]
    assert target.facts["outputs"][1] == f"present.0.key {cache}[batch, 2, 256, 32]"
