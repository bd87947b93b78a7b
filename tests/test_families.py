"""Families of Hugging Face models, with random weights: what becomes of each, and the table that says so.

The truth is torch: its outputs, and the tokens of transformers' `generate`. docs/families.md is made anew by

    pytest tests/test_families.py -m "" --families
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.data import generate, random_feeds
from llmc.compiler.data.own_cache import with_own_cache
from llmc.compiler.data.text import is_past
from llmc.compiler.errors import LlmcError, TargetError
from llmc.compiler.generation.choosing import greedy
from llmc.compiler.generation.decoder import LONGEST, Decoder, Input, pad_left
from llmc.compiler.generation.encoder_decoder import EncoderDecoder, pad_right
from llmc.compiler.loaders import HALVES, Feeds, Loaded, load
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.profiles import symbolic_dimensions
from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.compiler.targets import BuildRequest, Range
from llmc.compiler.targets.tensorrt import TensorRT
from llmc.compiler.targets.tensorrt_import import availability
from llmc.passes.base import Context, Skip
from llmc.passes.cache.int8_cache import Int8Cache, quantized
from llmc.passes.cache.quantize_kv_cache import QuantizeKvCache
from llmc.passes.cache.scatter_kv_cache import ScatterKvCache
from llmc.passes.cache.static_cache import StaticCache
from llmc.passes.graph import Array, Graph, copy_graph, infer_shapes, save_model, shape_of, to_model

TABLE = Path(__file__).parent.parent / "docs" / "families.md"
TOKENS = 64
LENGTHS = {"one": (11,), "padded": (11, 4, 7)}
"""Of prompts; shorter ones are padded on the left."""
ROOM = max(LENGTHS["one"]) + TOKENS
"""Tokens of a static cache: the last one generated fills it."""
TOLERANCE = 2e-5
"""Of the largest value: some dozens of dependent float32 roundings, 2^-24 each; a mask that is lost shows as 1e-2."""
CAPABILITIES = (80, 86, 89, 120)

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
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
ENDS = {"bos_token_id": 0, "eos_token_id": 1}
SHORT = {key: PLAIN[key] for key in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id")}
VISION = {key: PLAIN[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {**GROUPED, "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


SCALED = {"factor": 4.0, "original_max_position_embeddings": 32}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", GROUPED),
    "GPT-2": ("GPT2LMHeadModel", {**GPT2, **ENDS}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", PLAIN),
    "OPT": ("OPTForCausalLM", {**PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "BLOOM": ("BloomForCausalLM", {**SHORT, "n_layer": 2, "n_head": 4}),
    "Falcon": ("FalconForCausalLM", {**PLAIN, "multi_query": True, "new_decoder_architecture": False}),
    "Mistral": ("MistralForCausalLM", WINDOW),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", GROUPED),
    "Gemma": ("GemmaForCausalLM", GROUPED),
    "Gemma 2": ("Gemma2ForCausalLM", {**WINDOW, "query_pre_attn_scalar": 8}),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        {**WINDOW, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Phi-3": ("Phi3ForCausalLM", GROUPED),
    "SmolLM3": ("SmolLM3ForCausalLM", {**GROUPED, "no_rope_layer_interval": 2}),
    "OLMo2": ("Olmo2ForCausalLM", GROUPED),
    "Granite": ("GraniteForCausalLM", GROUPED),
    "GLM4": ("Glm4ForCausalLM", GROUPED),
    "GPT-OSS": ("GptOssForCausalLM", {**EXPERTS, "sliding_window": 8}),
    "Mixtral": ("MixtralForCausalLM", EXPERTS),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    # What a family may have, or not.
    "Llama, one key-value head": ("LlamaForCausalLM", {**GROUPED, "num_key_value_heads": 1}),
    "Llama, tied embeddings": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "Llama, biases": ("LlamaForCausalLM", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "Llama, RoPE linear": ("LlamaForCausalLM", rope("linear", factor=4.0)),
    "Llama, RoPE llama3": (
        "LlamaForCausalLM",
        rope("llama3", **SCALED, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "Llama, RoPE yarn": ("LlamaForCausalLM", rope("yarn", **SCALED)),
    "Falcon, grouped": ("FalconForCausalLM", {**PLAIN, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "Phi, partial RoPE": ("PhiForCausalLM", {**PLAIN, "partial_rotary_factor": 0.5}),
    "StableLM, partial RoPE": (
        "StableLmForCausalLM",
        {**PLAIN, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    ),
    "GPT-J, interleaved RoPE": ("GPTJForCausalLM", {**GPT2, **ENDS, "rotary_dim": 4, "n_inner": 64}),
    "Cohere, interleaved RoPE": ("CohereForCausalLM", GROUPED),
    "Qwen2, sliding window": ("Qwen2ForCausalLM", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "DeepSeek-V3, latent attention": (
        "DeepseekV3ForCausalLM",
        {
            **PLAIN, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        },
    ),
}  # fmt: skip
NATIVE = {"Llama", "Mistral", "Qwen2"}
NATIVE_OPERATORS = {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4, "Swish": 2, "Softmax": 0, "Split": 2}
"""Of their two layers, and the norm behind these."""
GROWING_ONLY = {"DeepSeek-V3, latent attention": "Split"}
"""Families whose cache stays a growing one, and the operator that keeps it so."""
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama, RoPE dynamic": (
        "LlamaForCausalLM",
        rope("dynamic", factor=4.0),
        r"RoPE scaling 'dynamic'.*past 128 tokens",
    ),
    "MPT": (
        "MptForCausalLM",
        {"vocab_size": 99, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
        "cannot be exported to ONNX",
    ),
    "Mamba": (
        "MambaForCausalLM",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        r"set model\.cache to none",
    ),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertModel", PLAIN),
    "DistilBERT": (
        "DistilBertModel",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99, "max_position_embeddings": 128},
    ),
    "RoBERTa": ("RobertaModel", PLAIN),
    "DeBERTa-v2": (
        "DebertaV2Model",
        {
            **PLAIN, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
            "share_att_key": True,
        },
    ),
    "ViT": ("ViTModel", {**VISION, "image_size": 16, "patch_size": 4}),
    "CLIP, text": ("CLIPTextModel", PLAIN),
    "CLIP, vision": ("CLIPVisionModel", {**VISION, "image_size": 16, "patch_size": 4}),
    "SigLIP, text": ("SiglipTextModel", {**PLAIN, "max_position_embeddings": 16}),
    "SigLIP, vision": ("SiglipVisionModel", {**VISION, "image_size": 16, "patch_size": 4}),
    "DINOv2": ("Dinov2Model", {**VISION, "image_size": 16, "patch_size": 4, "mlp_ratio": 2}),
}  # fmt: skip
CONVOLUTIONS = {
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 4,
}
SOUND = {**PLAIN, **CONVOLUTIONS, "num_feat_extract_layers": 3, "num_conv_pos_embedding_groups": 2}
IMAGES = {**VISION, "image_size": 16, "patch_size": 4}
ENCODERS |= {
    "CLIP": ("CLIPModel", {"text_config": PLAIN, "vision_config": IMAGES, "projection_dim": 16}),
    "SigLIP": ("SiglipModel", {"text_config": {**PLAIN, "max_position_embeddings": 16}, "vision_config": IMAGES}),
    "wav2vec2": ("Wav2Vec2Model", SOUND),
    "wav2vec2, with a mask": (
        "Wav2Vec2ForCTC",
        {**SOUND, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
    ),
    "HuBERT": ("HubertModel", SOUND),
}
FIRST = 1
"""The token that an encoder-decoder's answers begin with."""
PAIR = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": FIRST,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": FIRST, "pad_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "T5": ("T5ForConditionalGeneration", T5, 0.25),
    "T5 1.1": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        0.5,
    ),
    "BART": ("BartForConditionalGeneration", {**PAIR, "max_position_embeddings": 128}, 0.5),
    "Marian": ("MarianMTModel", {**PAIR, "max_position_embeddings": 128}, 0.1),
    "Pegasus": ("PegasusForConditionalGeneration", {**PAIR, "max_position_embeddings": 128}, 0.5),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {**PAIR, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 128},
        0.5,
    ),
}
"""Class, configuration, and the spread of the random weights with which tokens vary."""
MINILM = "MiniLM, its real weights"
SPREAD = {"BLOOM": 0.15}
"""Of the random weights of a decoder, where tokens would not vary with 0.25."""
FAST = {"Llama", "Llama, RoPE dynamic"}


def some_slow(names: Mapping[str, Any]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


# Models


def save(name: str, settings: Mapping[str, Any], folder: Path, spread: float = 0.25) -> Any:
    """A torch model of transformers class `name`, with random weights, saved to `folder`."""
    import torch
    import transformers

    torch.manual_seed(0)
    with quiet():
        kind = getattr(transformers, name)
        model = kind(kind.config_class(**{"tie_word_embeddings": False, **settings})).eval()
        for parameter in model.parameters():  # as initialized, logits hardly differ, and tokens do not vary
            if parameter.ndim > 1 and parameter.requires_grad:  # tables of sines are not saved
                parameter.data.normal_(0.0, spread)
            elif parameter.requires_grad:  # biases of 0 and scales of 1 would leave the graph
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None  # no answer ends before its last token
        model.save_pretrained(folder)
    return model


@dataclass
class Family:
    """One family, loaded, and after the passes of `optimize`."""

    name: str
    model: Any
    loaded: Loaded
    nodes: int
    """Of the graph as it was loaded."""

    @cached_property
    def growing(self) -> Graph:
        return optimized(self.loaded.graph)

    def static(self, length: int) -> Graph:
        """The growing graph with static caches. Raises ValueError with the reason why it stays as it is."""
        graph = copy_graph(self.growing)
        result = ScatterKvCache(length=length).run(graph, Context())
        if not result.rewrites:
            raise ValueError(result.near_misses[0].reason)
        infer_shapes(graph)
        return graph


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Callable[[str], Family]:
    @cache
    def family(name: str) -> Family:
        folder, model = minilm, None
        if name != MINILM:
            folder = tmp_path_factory.mktemp("family")
            model = save(*{**DECODERS, **ENCODERS}[name], folder, SPREAD.get(name, 0.25))
        loaded = load(str(folder))
        return Family(name, model, loaded, len(loaded.graph.nodes))

    return family


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Family, Family]]:
    @cache
    def halves(name: str) -> tuple[Family, Family]:
        kind, settings, spread = ENCODER_DECODERS[name]
        folder = tmp_path_factory.mktemp("family")
        model = save(kind, settings, folder, spread)
        encoder, decoder = (load(str(folder), half=half) for half in HALVES)
        return (
            Family(name, model, encoder, len(encoder.graph.nodes)),
            Family(name, model, decoder, len(decoder.graph.nodes)),
        )

    return halves


def optimized(graph: Graph) -> Graph:
    changed, context = copy_graph(graph), Context()
    for step in Recipe.load("optimize").passes:
        with suppress(Skip):
            step.run(changed, context)
    infer_shapes(changed)
    return changed


def decoder(growing: Graph, graph: Graph) -> Decoder:
    """Of a graph that may be the static form of `growing`."""
    session, longest = Session(graph), graph.metadata.get(LONGEST)
    inputs = [Input(t.name, np.dtype(t.dtype), shape_of(t) or ()) for t in growing.inputs]
    return Decoder(inputs, session.outputs, session.run, int(longest) if longest else None)


def generated(model: Any, ids: Array, mask: Array, count: int = TOKENS) -> Array:
    import torch

    settings = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
    with quiet(), torch.inference_mode():
        found = model.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **settings)
    tokens: Array = found.numpy()[:, ids.shape[1] :]
    return tokens


def prompts(lengths: tuple[int, ...]) -> tuple[Array, Array]:
    rng = np.random.default_rng(3)
    return pad_left([rng.integers(2, 99, length).tolist() for length in lengths])


def answered(model: Any, feeds: Feeds) -> Array:
    """What `generate` answers in TOKENS tokens, by its own rules alone: Whisper's would cut sound into pieces first."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation import GenerationMixin

    before, model.generation_config = (
        model.generation_config,
        GenerationConfig(do_sample=False, max_new_tokens=TOKENS, pad_token_id=0, decoder_start_token_id=FIRST),
    )
    with quiet(), torch.inference_mode():
        found = GenerationMixin.generate(model, **{name: torch.from_numpy(value) for name, value in feeds.items()})
    model.generation_config = before
    tokens: Array = found.numpy()[:, 1:]
    return tokens


def read_by_encoder(family: Family, lengths: tuple[int, ...]) -> Feeds:
    """A prompt of each length, padded on the right; or as many sounds, which are all as long."""
    rng = np.random.default_rng(4)
    (given, *_) = family.loaded.graph.inputs
    if given.name == "input_ids":
        return pad_right([rng.integers(3, 99, length).tolist() for length in lengths])
    return {given.name: rng.standard_normal((len(lengths), *given.shape[1:]), np.float32)}


def equal_answers(pair: tuple[Family, Family], graph: Graph) -> None:
    """The encoder, and `graph` as the decoder, answer as transformers does: one prompt, and several, padded."""
    encoder, words = pair
    both = EncoderDecoder(Session(encoder.growing).run, decoder(words.growing, graph), [FIRST])
    for lengths in LENGTHS.values():
        feeds = read_by_encoder(encoder, lengths)
        expected = answered(encoder.model, feeds)
        assert len(lengths) == 1 or len(np.unique(expected)) > 4, "tokens that hardly vary show nothing"
        found = np.stack(list(islice(both.generate(feeds, greedy), TOKENS)), axis=1)
        np.testing.assert_array_equal(found, expected, err_msg=f"{encoder.name}, {len(lengths)} prompts")


def equal_tokens(family: Family, graph: Graph) -> None:
    """`graph` generates what transformers does, for one prompt and for several, padded on the left."""
    for lengths in LENGTHS.values():
        ids, mask = prompts(lengths)
        expected = generated(family.model, ids, mask)
        found = np.stack(list(islice(decoder(family.growing, graph).generate(ids, mask, greedy), TOKENS)), axis=1)
        np.testing.assert_array_equal(found, expected, err_msg=f"{family.name}, {len(lengths)} prompts")


def equal_at_every_fill_level(found: Family) -> None:
    """The static form gives what the growing one gives, whatever stands behind the tokens of its cache."""
    room = 20
    graph = found.static(room)
    growing, static, static_cache = Session(found.growing), Session(graph), StaticCache.of(graph)
    assert static_cache is not None
    types = {tensor.name: np.dtype(tensor.dtype) for tensor in graph.inputs}
    rng = np.random.default_rng(0)
    for past in range(room):
        for new in {1, room - past}:
            sizes = {"batch": 2, "sequence": new, "past_sequence": past, "encoder_sequence": 5}
            feeds = random_feeds(found.growing.inputs, sizes, {"input_ids": 99}, rng)
            fed = static_cache.feeds(feeds, types)
            for place in static_cache.caches:  # what stands behind the tokens must not matter
                fed[place][:, :, past:] = 9 * rng.standard_normal(fed[place][:, :, past:].shape)
            expected, outputs = growing.run(feeds), static_cache.outputs(feeds, static.run(fed))
            for output, value in expected.items():
                limit = TOLERANCE * float(np.abs(value).max())
                np.testing.assert_allclose(outputs[output], value, rtol=0, atol=limit, err_msg=f"{past} + {new}")


def difference(family: Family, graph: Graph) -> float:
    """From torch's outputs, as a part of the largest value of each."""
    assert family.loaded.reference is not None
    sizes = {name: 3 * family.loaded.least.get(name, 1) for name in symbolic_dimensions(family.growing)}
    bounds = {"input_ids": family.loaded.vocabulary or 99, "token_type_ids": 2}
    feeds = random_feeds(family.loaded.graph.inputs, sizes, bounds, np.random.default_rng(0))
    expected, found = family.loaded.reference(feeds), Session(graph).run(feeds)
    return max(float(np.abs(found[name] - value).max() / np.abs(value).max()) for name, value in expected.items())


def built_for(family: Family, graph: Graph, folder: Path) -> str:
    """The compute capabilities that TensorRT-RTX builds the graph for, or the reason why none."""
    missing = availability("tensorrt-rtx").missing
    if missing:
        return f"not tried: {missing}"
    least = {name: family.loaded.least.get(name, 1) for name in symbolic_dimensions(graph)}
    sizes = {name: Range(size, 2 * size, 8 * size) for name, size in least.items()}
    request = BuildRequest([sizes], CAPABILITIES)
    target = TensorRT("tensorrt-rtx")
    problems = target.check(graph, request)
    if not problems:
        save_model(graph, folder / "model.onnx")
        try:
            target.build(folder / "model.onnx", folder, request, lambda _: None)
        except TargetError as error:
            problems = str(error).splitlines()
    return f"no: {problems[0]}" if problems else "SM " + ", ".join(map(str, CAPABILITIES))


# The table


@dataclass(frozen=True)
class Row:
    """One line of docs/families.md."""

    model: str
    cache: str
    exported: str = ""
    nodes: str = ""
    difference: str = ""
    tokens: str = ""
    tensorrt: str = ""
    note: str = ""

    def __str__(self) -> str:
        return "| " + " | ".join(getattr(self, field.name) for field in fields(self)) + " |"


HEAD = """# Families of models

What becomes of each family of Hugging Face models: a model of two layers with random weights (unless said) is loaded,
the passes of `optimize` are run, and the result is compared with torch. Made by

```
pytest tests/test_families.py -m "" --families
```

- *Exported*: the opset and the attention of transformers that proved right first.
- *Nodes*: as exported → after the passes.
- *Difference*: of float32 outputs from torch's, as a part of their largest value.
- *Tokens*: generated greedily, equal to those of transformers' `generate`, for one prompt and for three of different
  lengths, padded on the left.
  Encoder-decoders are two graphs: theirs are answers of both together, to prompts padded on the right.
- *TensorRT-RTX*: what an engine in float32 builds for. Growing caches are for ONNX Runtime: TensorRT takes static ones,
  which `scatter-kv-cache` makes of them.

| Model | Cache | Exported | Nodes | Difference | Tokens | TensorRT-RTX | Note |
|---|---|---|---|---|---|---|---|
"""


def expected_rows() -> list[tuple[str, str]]:
    """Model and cache of every row, in order."""
    decoders = [(name, form) for name in DECODERS for form in ("growing", "static")]
    pairs = [(name, form) for name in ENCODER_DECODERS for form in ("encoder", "growing", "static")]
    alone = [*((name, "refused") for name in REFUSED), *((name, "none") for name in (*ENCODERS, MINILM))]
    return [*decoders, *pairs, *alone]


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """What is found; with --families it takes the place of the same rows in docs/families.md."""
    found: list[Row] = []
    yield found
    if request.config.getoption("--families"):
        lines = {key: line for line in TABLE.read_text().splitlines() if (key := _key(line))} if TABLE.exists() else {}
        lines |= {(row.model, row.cache): str(row) for row in found}
        TABLE.write_text(HEAD + "".join(f"{lines[key]}\n" for key in expected_rows() if key in lines))


def _key(line: str) -> tuple[str, str] | None:
    parts = [part.strip() for part in line.split("|")]
    return (parts[1], parts[2]) if len(parts) == len(fields(Row)) + 2 and parts[1] not in ("Model", "---") else None


def test_the_table_has_every_family() -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert [key for line in lines if (key := _key(line))] == expected_rows(), f"run {HEAD.split('```')[1].strip()}"
    assert TABLE.read_text(encoding="utf-8").startswith(HEAD)


def row(family: Family, cache: str, graph: Graph, **cells: str) -> Row:
    exported = family.loaded.exporter.removeprefix("torch.onnx dynamo, ")
    far = difference(family, graph)
    assert far < TOLERANCE
    nodes = f"{family.nodes} → {len(graph.nodes)}"
    return Row(family.name, cache, exported, nodes, f"{far:.0e}", **cells)


# Tests


@pytest.mark.parametrize("name", some_slow(DECODERS))
def test_growing_cache(family: Callable[[str], Family], rows: list[Row], name: str) -> None:
    found = family(name)
    varied = [len(np.unique(generated(found.model, *prompts(lengths)))) for lengths in LENGTHS.values()]
    assert min(varied) > 4, "tokens that hardly vary show nothing"
    equal_tokens(found, found.growing)
    if name in NATIVE:
        operators = Counter(node.op for node in found.growing.nodes)
        assert {op: operators[op] for op in NATIVE_OPERATORS} == NATIVE_OPERATORS
    rows.append(row(found, "growing", found.growing, tokens=f"{TOKENS}", tensorrt="needs static"))


@pytest.mark.parametrize("name", some_slow(DECODERS))
def test_static_cache(family: Callable[[str], Family], rows: list[Row], name: str, tmp_path: Path) -> None:
    found = family(name)
    if name in GROWING_ONLY:
        with pytest.raises(ValueError, match=rf"{GROWING_ONLY[name]} .* computes along the cache") as reason:
            found.static(ROOM)
        rows.append(Row(name, "static", note=f"stays growing: {reason.value}"))
        return
    graph = found.static(ROOM)
    equal_tokens(found, graph)
    rows.append(row(found, "static", graph, tokens=f"{TOKENS}", tensorrt=built_for(found, graph, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_and_decoder(
    halves: Callable[[str], tuple[Family, Family]], rows: list[Row], name: str, tmp_path: Path
) -> None:
    encoder, found = pair = halves(name)
    equal_answers(pair, found.growing)
    static = found.static(TOKENS)  # the start token, and all but the last of the answer
    equal_answers(pair, static)
    builds = [built_for(encoder, encoder.growing, tmp_path), "needs static", built_for(found, static, tmp_path)]
    rows.append(row(encoder, "encoder", encoder.growing, tensorrt=builds[0]))
    rows.append(row(found, "growing", found.growing, tokens=f"{TOKENS}", tensorrt=builds[1]))
    rows.append(row(found, "static", static, tokens=f"{TOKENS}", tensorrt=builds[2]))


@pytest.mark.parametrize("name", some_slow({name: 0 for name in DECODERS if name not in GROWING_ONLY}))
def test_static_cache_at_every_fill_level(family: Callable[[str], Family], name: str) -> None:
    equal_at_every_fill_level(family(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_static_cache_beside_an_encoder_at_every_fill_level(
    halves: Callable[[str], tuple[Family, Family]], name: str
) -> None:
    equal_at_every_fill_level(halves(name)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_int8_caches(family: Callable[[str], Family], name: str) -> None:
    """All caches of every family, and both forms write the same levels into them."""
    found = family(name)
    pasts = [tensor.name for tensor in found.growing.inputs if is_past(tensor.name)]
    sizes = [dict.fromkeys(symbolic_dimensions(found.growing), 2) | {"sequence": 5, "past_sequence": p} for p in (0, 6)]
    drawn = generate(found.growing, sizes, vocabulary=found.loaded.vocabulary or 99, count=4)
    samples = [  # no padding: growing caches are calibrated without, static ones with it
        {n: np.ones_like(v) if n == "attention_mask" else v for n, v in sample.items()}
        for sample in with_own_cache(drawn, found.growing)
    ]
    levels = []
    for graph in [found.growing] if name in GROWING_ONLY else [found.growing, found.static(ROOM)]:
        changed = copy_graph(graph)
        result = QuantizeKvCache().run(changed, Context(activations=SampledActivations(samples)))
        assert (len(result.rewrites), result.near_misses) == (len(pasts), [])
        onnx.checker.check_model(to_model(changed), full_check=True)
        held = Int8Cache.of(changed)
        assert held is not None
        assert sorted(held.caches) == sorted(pasts)
        made = list(Session(changed).run_each(samples))
        levels.append([quantized(run[held.caches[past]], held.scale(past)) for run in made for past in pasts])
    for one, other in zip(levels[0], levels[-1], strict=True):
        # Zeros are added where no token is: what stands between two levels may go to the other one.
        assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.parametrize("name", some_slow(DECODERS))
def test_padding_on_the_right(family: Callable[[str], Family], name: str) -> None:
    """Tokens before the padding do not see it; a prompt that ends in it would be answered by what follows padding."""
    found = family(name)
    ids, mask = (value[:, ::-1].copy() for value in prompts(LENGTHS["padded"]))
    feeds: Feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    past = {t.name: np.zeros((3, t.shape[1], 0, t.shape[3]), np.float32) for t in found.growing.inputs if t.shape[2:]}
    assert found.loaded.reference is not None
    expected = found.loaded.reference({**feeds, **past})["logits"][mask == 1]
    logits = Session(found.growing).run({**feeds, **past})["logits"][mask == 1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * float(np.abs(expected).max()))
    with pytest.raises(LlmcError, match="padded on the left"):
        next(decoder(found.growing, found.growing).generate(ids, mask, greedy))


def test_inputs_and_outputs(family: Callable[[str], Family]) -> None:
    loaded = family("Llama").loaded
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


@pytest.mark.parametrize("name", some_slow(REFUSED))
def test_refused(rows: list[Row], name: str, tmp_path: Path) -> None:
    kind, settings, reason = REFUSED[name]
    save(kind, settings, tmp_path)
    with pytest.raises(LlmcError, match=reason) as error:
        load(str(tmp_path))
    rows.append(Row(name, "refused", note=str(error.value).replace("\n", " ").replace("|", "/")))


@pytest.mark.slow
def test_long_rope_ends_where_its_cache_would_be_computed_anew(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    settings = rope("longrope", **factors, original_max_position_embeddings=32)
    model = save("Phi3ForCausalLM", {**settings, "original_max_position_embeddings": 32}, tmp_path)
    loaded = load(str(tmp_path))
    assert set(loaded.limits.values()) == {32}
    assert any("longrope" in note and "32" in note for note in loaded.notes)
    ids, mask = prompts(LENGTHS["one"])
    stream = decoder(loaded.graph, loaded.graph).generate(ids, mask, greedy)
    found = np.stack(list(islice(stream, 32 - 11 + 1)), axis=1)
    np.testing.assert_array_equal(found, generated(model, ids, mask, 32 - 11 + 1))
    with pytest.raises(LlmcError, match="33 tokens, prompt and answer: the graph is right for 32 at most"):
        next(stream)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ENCODERS, MINILM])
def test_encoder(family: Callable[[str], Family], rows: list[Row], name: str, tmp_path: Path) -> None:
    found = family(name)
    rows.append(row(found, "none", found.growing, tensorrt=built_for(found, found.growing, tmp_path)))
