"""Decoders as optimum writes them, by torch's legacy exporter with caches in and out: optimized and compared.

optimum itself does not run beside this transformers; what its exporter does is done here by hand. The truth for
numerics is ONNX Runtime on the graph as it was written, for counts the architecture.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.loaders.key_values import cache_inputs, cache_outputs, past_cache, present_values
from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.passes.base import Context, Skip
from llmc.passes.graph import Array, Graph, copy_graph, load_model, scopes, to_model

HIDDEN, HEADS, VOCABULARY = 32, 4, 64
TOLERANCE = 2e-5
"""Of the largest value: some dozens of dependent float32 roundings, 2^-24 each; a mask that is lost shows as 1e-2."""
SIZES = ((2, 5, 0), (3, 1, 4), (2, 3, 2))
"""Batch, new tokens, tokens in the cache."""
WAYS = (("eager", 14), ("sdpa", 14), ("sdpa", 18))
"""Attention of transformers and opset: optimum 1.x before and after 1.18, and optimum-onnx."""
TOKENS, WHOLE = "past_sequence_length", "past_sequence_length + sequence_length"


@dataclass(frozen=True)
class Family:
    """A model class of transformers, and how many nodes a layer of it has in the end."""

    kind: str
    nodes: int
    settings: dict[str, Any]
    norm: str = "RMSNormalization"
    norms: int = 2
    rotations: int = 2
    layers: str = "num_hidden_layers"


COMMON = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * HIDDEN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
GPT2 = {"n_embd": HIDDEN, "n_head": HEADS, "n_positions": 64, **{k: v for k, v in COMMON.items() if "token" in k}}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", 21, GROUPED),
    "mistral": Family("MistralForCausalLM", 21, {**GROUPED, "sliding_window": 4}),
    "qwen2": Family("Qwen2ForCausalLM", 22, GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", 23, {**GROUPED, "head_dim": 8}, norms=4),
    "gemma": Family("GemmaForCausalLM", 21, {**GROUPED, "num_key_value_heads": 1, "head_dim": 8}),
    "phi3": Family("Phi3ForCausalLM", 21, GROUPED),
    "gpt2": Family(
        "GPT2LMHeadModel", 21, {**GPT2, "vocab_size": VOCABULARY}, "LayerNormalization", 2, 0, layers="n_layer"
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", 23, {**COMMON, "rotary_pct": 0.5}, "LayerNormalization"),
}
"""The biases of Qwen2, one node, and the norms of Qwen3's heads, two, come on top of 21, and of GPT-NeoX's four."""
FAST = {("llama", "eager", 14), ("phi3", "sdpa", 14), ("gpt2", "sdpa", 18), ("gpt_neox", "eager", 14)}
CASES = [
    pytest.param(
        name, attention, opset, False, marks=() if (name, attention, opset) in FAST else pytest.mark.slow,
        id=f"{name}-{attention}-{opset}",
    )
    for name in FAMILIES
    for attention, opset in WAYS
]  # fmt: skip
CASES.append(pytest.param("mistral", "eager", 14, True, id="mistral-eager-14-oldest-rotary"))


def export(family: Family, layers: int, attention: str, opset: int, path: Path, oldest: bool = False) -> None:
    """A decoder with random weights and norms, with its cache as inputs and outputs."""
    import torch
    import transformers

    kind = getattr(transformers, family.kind)
    torch.manual_seed(0)
    settings = {**family.settings, family.layers: layers}
    model = kind(kind.config_class(**settings, attn_implementation=attention)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * (0.5 if parameter.ndim == 1 else 0.1))
    if oldest:
        spell_rotary_as_before(model)
    past = cache_inputs(model)
    names = ["input_ids", "attention_mask", "position_ids", *(tensor.name for tensor in past)]
    whole = torch.ones((2, 8), dtype=torch.int64)
    sample = [whole[:, :3], whole, torch.arange(5, 8).expand(2, 3)]
    sample.extend(torch.rand([2, tensor.shape[1], 5, tensor.shape[3]]) for tensor in past)

    class Cached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> Any:
            given = dict(zip(names, values, strict=True))
            cache = past_cache(given, layers)
            model.whole = given["attention_mask"].shape[1]
            made = self.model(**{name: given[name] for name in names[:3]}, past_key_values=cache, use_cache=True)
            return (made.logits, *present_values(made.past_key_values))

    outputs = cache_outputs(layers)
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in ("input_ids", "position_ids", "logits")}
    axes |= {"attention_mask": {0: "batch_size", 1: WHOLE}}
    axes |= {name: {0: "batch_size", 2: TOKENS} for name in names[3:]}
    axes |= {name: {0: "batch_size", 2: WHOLE} for name in outputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about tracing and deprecations
        logging.disable(logging.WARNING)
        torch.onnx.export(
            Cached(),
            tuple(sample),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=names,
            output_names=["logits", *outputs],
            dynamic_axes=axes,
        )
        logging.disable(logging.NOTSET)


def spell_rotary_as_before(model: Any) -> None:
    """Tables of the longest sequence, cut to this one, and then the rows of its positions: transformers up to 4.37."""
    import torch

    places = torch.arange(64)[:, None] * model.model.rotary_emb.inv_freq[None]
    angles = torch.cat((places, places), dim=-1)[None, None]
    tables = angles.cos(), angles.sin()

    def forward(x: Any, position_ids: Any) -> Any:
        whole = getattr(model, "whole", 64)  # none yet where the model is only asked for its cache
        cut = (table[:, :, :whole, ...].to(x.dtype) for table in tables)
        return tuple(table.squeeze(1).squeeze(0)[position_ids] for table in cut)

    model.model.rotary_emb.forward = forward


def optimize(graph: Graph) -> None:
    for step in Recipe.load("optimize").passes:
        with suppress(Skip):
            step.run(graph, Context())


def feeds(graph: Graph, batch: int, new: int, past: int) -> dict[str, Array]:
    rng = np.random.default_rng(past)
    given: dict[str, Array] = {}
    mask = np.ones((batch, past + new), np.int64)
    mask[1:, :1] = 0
    for tensor in graph.inputs:
        if tensor.name == "attention_mask":
            given[tensor.name] = mask
        elif tensor.name == "position_ids":
            given[tensor.name] = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
        elif tensor.name == "input_ids":
            given[tensor.name] = rng.integers(1, VOCABULARY, (batch, new))
        else:
            given[tensor.name] = rng.standard_normal((batch, tensor.shape[1], past, tensor.shape[3])).astype(np.float32)
    return given


@pytest.mark.parametrize(("name", "attention", "opset", "oldest"), CASES)
def test_decoder(name: str, attention: str, opset: int, oldest: bool, tmp_path: Path) -> None:
    family, counts = FAMILIES[name], list[Counter[str]]()
    for layers in (1, 2):
        export(family, layers, attention, opset, tmp_path / f"{layers}.onnx", oldest)
        before = load_model(tmp_path / f"{layers}.onnx")
        graph = copy_graph(before)
        optimize(graph)
        counts.append(Counter(node.op for scope in scopes(graph) for node in scope.nodes))
    onnx.checker.check_model(to_model(graph), full_check=True)
    one, other = Session(before), Session(graph)
    for sizes in SIZES:
        given = feeds(before, *sizes)
        found = other.run(given)
        for output, value in one.run(given).items():
            scale = max(float(np.abs(value).max(initial=0)), 1.0)
            np.testing.assert_allclose(
                found[output], value, rtol=0, atol=TOLERANCE * scale, err_msg=f"{output} {sizes}"
            )
    added = {op: counts[1][op] - counts[0][op] for op in counts[1]}
    shared = name == "gpt_neox" and opset < 17  # two norms of one tensor: what both divide by is computed once
    assert sum(added.values()) <= family.nodes + 3 * shared, added
    expected = {"Attention": 1, family.norm: family.norms - shared, "RotaryEmbedding": family.rotations, "Softmax": 0}
    assert {op: added.get(op, 0) for op in expected} == expected
