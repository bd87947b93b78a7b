"""Real graphs: architectures with random weights, through torch's exporters, optimized, counted and compared.

The truth for numerics is the graph as it was exported; for counts it is the architecture, written down by hand.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.passes.base import Context, Skip
from llmc.passes.graph import Array, Graph, copy_graph, load_model, scopes, to_model

EXPORTS = ("dynamo-20", "dynamo-23", "legacy-17")
"""torch's exporter and its opset. Rotary embeddings are exported at 24 for 23, where torch fuses them to one that takes
no batch over 1."""
LAYERS = 2
HIDDEN, HEADS, VOCABULARY = 32, 4, 64
SIZES = ((2, 8), (3, 5))
"""Batch and sequence length of the runs that are compared; the first is what is exported with."""
TOLERANCE = 2e-5
"""Of the largest value: some dozens of dependent float32 roundings, 2^-24 each; a mask that is lost shows as 1e-2."""
COUNTED = (
    "Attention",
    "BatchNormalization",
    "Gelu",
    "GroupNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "RotaryEmbedding",
)


# Architectures


@dataclass(frozen=True)
class Architecture:
    """A model as a function of how it is to do attention, what goes in, and what one counts on it.

    `eager` ones have no other way to do attention that torch.onnx.export(dynamo=True) takes. `left`: how many
    of other operators are left.
    """

    make: Callable[[str], Any]
    feeds: Callable[[int, int, np.random.Generator], dict[str, Array]]
    counts: dict[str, int]
    eager: bool = False
    left: dict[str, int] = field(default_factory=dict)


def tokens(batch: int, length: int, rng: np.random.Generator) -> dict[str, Array]:
    """Token ids, and a mask that hides the last tokens of each sequence but the first: one more in each."""
    mask = np.ones((batch, length), np.int64)
    for row in range(1, batch):
        mask[row, length - row :] = 0
    return {"input_ids": rng.integers(3, VOCABULARY, (batch, length)), "attention_mask": mask}


def pixels(batch: int, _length: int, rng: np.random.Generator) -> dict[str, Array]:
    return {"pixel_values": rng.standard_normal((batch, 3, 16, 16)).astype(np.float32)}


def features(batch: int, _length: int, rng: np.random.Generator) -> dict[str, Array]:
    return {"input_features": rng.standard_normal((batch, 8, 16)).astype(np.float32)}


def translated(batch: int, length: int, rng: np.random.Generator) -> dict[str, Array]:
    """Tokens for an encoder, and one more for a decoder."""
    return {**tokens(batch, length, rng), "decoder_input_ids": rng.integers(3, VOCABULARY, (batch, length + 1))}


def transcribed(batch: int, length: int, rng: np.random.Generator) -> dict[str, Array]:
    """Sound for an encoder, and tokens with their mask for a decoder."""
    return features(batch, length, rng) | {f"decoder_{name}": ids for name, ids in tokens(batch, length, rng).items()}


def hidden(_batch: int, _length: int, rng: np.random.Generator) -> dict[str, Array]:
    """Of one size: the legacy exporter writes the batch into torch.nn.MultiheadAttention as a number."""
    return {"hidden_states": rng.standard_normal((2, 8, HIDDEN)).astype(np.float32)}


def hidden_and_memory(batch: int, length: int, rng: np.random.Generator) -> dict[str, Array]:
    """The same for a decoder, with what an encoder made of a longer sequence."""
    return hidden(batch, length, rng) | {"memory": rng.standard_normal((2, 11, HIDDEN)).astype(np.float32)}


def transformer(name: str, **settings: Any) -> Callable[[str], Any]:
    """The model class `name` of transformers, from its configuration with these settings."""

    def make(attention: str) -> Any:
        import transformers

        kind = getattr(transformers, name)
        return kind(kind.config_class(**settings, attn_implementation=attention))

    return make


BERT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * HIDDEN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
BART = {
    "d_model": HIDDEN,
    **{f"{part}_layers": LAYERS for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": HEADS for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 2 * HIDDEN for part in ("encoder", "decoder")},
    "vocab_size": VOCABULARY,
    "use_cache": False,
}
T5 = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": HEADS, "vocab_size": VOCABULARY}
VISION = {key: BERT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}


def encoder(norms: int, gelus: int = LAYERS) -> dict[str, int]:
    return {"Attention": LAYERS, "LayerNormalization": norms, "Gelu": gelus}


def decoder(norms: int, rotations: int = 2 * LAYERS, gelus: int = 0) -> dict[str, int]:
    return {"Attention": LAYERS, "RMSNormalization": norms, "RotaryEmbedding": rotations, "Gelu": gelus}


def both(norms: str, count: int, gelus: int = 0) -> dict[str, int]:
    """An encoder and a decoder: attention to itself in every layer of both, and to the other in the decoder's."""
    return {"Attention": 3 * LAYERS, norms: count, "Gelu": gelus}


def whisper_encoder(attention: str) -> Any:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(
        WhisperConfig(
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            encoder_ffn_dim=2 * HIDDEN,
            num_mel_bins=8,
            max_source_positions=8,
            attn_implementation=attention,
        )
    )


def resnet(_attention: str) -> Any:
    """Two residual blocks after a stem; BatchNormalization with statistics of its own."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int, wider: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(width, wider, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.ReLU(),
                nn.Conv2d(wider, wider, 3, padding=1, bias=False),
                nn.BatchNorm2d(wider),
            )
            self.short = nn.Sequential(nn.Conv2d(width, wider, 1, stride=2, bias=False), nn.BatchNorm2d(wider))

        def forward(self, x: Any) -> Any:
            return torch.relu(self.body(x) + self.short(x))

    stem = (nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, Block(8, 16), Block(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def torch_encoder(batch_first: bool) -> Callable[[str], Any]:
    """torch.nn.TransformerEncoderLayer, which has a torch.nn.MultiheadAttention."""

    def make(_attention: str) -> Any:
        from torch import nn

        layer = {"activation": "gelu", "batch_first": batch_first}
        return nn.Sequential(*(nn.TransformerEncoderLayer(HIDDEN, HEADS, 2 * HIDDEN, **layer) for _ in range(LAYERS)))

    return make


def torch_decoder(_attention: str) -> Any:
    """torch.nn.TransformerDecoderLayer: attention to itself, without a mask, and to a memory."""
    from torch import nn

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings: dict[str, Any] = {"activation": "gelu", "batch_first": True}
            layers = (nn.TransformerDecoderLayer(HIDDEN, HEADS, 2 * HIDDEN, **settings) for _ in range(LAYERS))
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Any, memory: Any) -> Any:
            for layer in self.layers:
                x = layer(x, memory)
            return x

    return Decoder()


def mobilenet(_attention: str) -> Any:
    """Inverted residuals with depthwise convolutions, squeeze and excitation, Hardswish and ReLU6."""
    from torch import nn

    class Inverted(nn.Module):
        def __init__(self, width: int, activation: Any) -> None:
            super().__init__()
            wide = 4 * width
            self.widen = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), activation())
            self.deep = nn.Sequential(
                nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), activation()
            )
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 8, 1), nn.ReLU(), nn.Conv2d(8, wide, 1), nn.Hardsigmoid()
            )
            self.narrow = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

        def forward(self, x: Any) -> Any:
            deep = self.deep(self.widen(x))
            return x + self.narrow(deep * self.gate(deep))

    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), Inverted(8, nn.Hardswish), Inverted(8, nn.ReLU6))


def unet(_attention: str) -> Any:
    """One level down and up again, with GroupNorm, SiLU, a skip connection and a transposed convolution."""
    import torch
    from torch import nn

    def block(width: int, wider: int) -> Any:
        return nn.Sequential(nn.Conv2d(width, wider, 3, padding=1), nn.GroupNorm(4, wider), nn.SiLU())

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.low, self.last = block(3, 8), block(8, 16), block(16, 8)
            self.down, self.up = nn.MaxPool2d(2), nn.ConvTranspose2d(16, 8, 2, stride=2)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Any) -> Any:
            first = self.first(x)
            risen = self.norm(self.up(self.low(self.down(first))))
            return self.last(torch.cat([first, risen], 1))

    return UNet()


ARCHITECTURES = {
    "bert": Architecture(transformer("BertModel", **BERT), tokens, encoder(1 + 2 * LAYERS)),
    "roberta": Architecture(transformer("RobertaModel", **BERT), tokens, encoder(1 + 2 * LAYERS)),
    "distilbert": Architecture(
        transformer(
            "DistilBertModel", dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=64, vocab_size=VOCABULARY
        ),
        tokens,
        encoder(1 + 2 * LAYERS),
    ),
    "deberta-v2": Architecture(
        transformer(
            "DebertaV2Model",
            **BERT,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            share_att_key=True,
        ),
        tokens,
        encoder(1 + 2 * LAYERS),
        eager=True,
    ),
    "vit": Architecture(
        transformer("ViTModel", **VISION, image_size=16, patch_size=4), pixels, encoder(2 * LAYERS + 1)
    ),
    "clip-text": Architecture(
        transformer("CLIPTextModel", **BERT, hidden_act="gelu", eos_token_id=2), tokens, encoder(2 * LAYERS + 1)
    ),
    "clip-vision": Architecture(
        transformer("CLIPVisionModel", **VISION, image_size=16, patch_size=4), pixels, encoder(2 * LAYERS + 1, 0)
    ),
    "whisper-encoder": Architecture(whisper_encoder, features, encoder(2 * LAYERS + 1, LAYERS + 2)),
    "t5-encoder": Architecture(
        transformer("T5EncoderModel", **T5),
        tokens,
        {"Attention": LAYERS, "RMSNormalization": 2 * LAYERS + 1},
        eager=True,
    ),
    "t5": Architecture(
        transformer("T5Model", **T5, use_cache=False), translated, both("RMSNormalization", 5 * LAYERS + 2), eager=True
    ),
    "bart": Architecture(
        transformer("BartModel", **BART, max_position_embeddings=32),
        translated,
        both("LayerNormalization", 5 * LAYERS + 2, 2 * LAYERS),
    ),
    "whisper": Architecture(
        transformer(
            "WhisperModel",
            **BART,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=32,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
        ),
        transcribed,
        both("LayerNormalization", 5 * LAYERS + 2, 2 * LAYERS + 2),
    ),
    "gpt2": Architecture(
        transformer(
            "GPT2Model",
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            vocab_size=VOCABULARY,
            n_positions=32,
            use_cache=False,
        ),
        tokens,
        encoder(2 * LAYERS + 1),
    ),
    "llama": Architecture(transformer("LlamaModel", **LLAMA), tokens, decoder(2 * LAYERS + 1)),
    "qwen2": Architecture(transformer("Qwen2Model", **LLAMA), tokens, decoder(2 * LAYERS + 1)),
    "qwen3": Architecture(  # queries and keys to heads, for their norms, and back; one Reshape is of the mask
        transformer("Qwen3Model", **LLAMA, head_dim=8),
        tokens,
        decoder(4 * LAYERS + 1),
        left={"Transpose": 0, "Reshape": 4 * LAYERS + 1, "Split": LAYERS},
    ),
    "gemma": Architecture(
        transformer("GemmaModel", **LLAMA, head_dim=8), tokens, decoder(2 * LAYERS + 1, gelus=LAYERS)
    ),
    "phi": Architecture(
        transformer("PhiModel", **LLAMA), tokens, encoder(LAYERS + 1) | {"RotaryEmbedding": 2 * LAYERS}
    ),
    "mistral": Architecture(transformer("MistralModel", **LLAMA), tokens, decoder(2 * LAYERS + 1)),
    "mixtral": Architecture(transformer("MixtralModel", **LLAMA, num_local_experts=4), tokens, decoder(2 * LAYERS + 1)),
    "gpt-neox": Architecture(
        transformer("GPTNeoXModel", **BERT, rotary_pct=0.5, use_cache=False),
        tokens,
        encoder(2 * LAYERS + 1) | {"RotaryEmbedding": 2 * LAYERS},
        left={"Transpose": 0, "Slice": 0},
    ),
    "falcon": Architecture(
        transformer("FalconModel", **BERT, multi_query=False, alibi=False, bias=True, use_cache=False),
        tokens,
        encoder(LAYERS + 1) | {"RotaryEmbedding": 2 * LAYERS},
        left={"Transpose": 0},
    ),
    "falcon-grouped": Architecture(  # Expand is of the rotary tables, Reshape of the mask
        transformer("FalconModel", **BERT, new_decoder_architecture=True, num_kv_heads=2, alibi=False, use_cache=False),
        tokens,
        encoder(2 * LAYERS + 1) | {"RotaryEmbedding": 2 * LAYERS},
        left={"Transpose": 0, "Expand": 2, "Reshape": 1, "Split": LAYERS},
    ),
    "bloom": Architecture(
        transformer(
            "BloomModel", hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCABULARY, use_cache=False
        ),
        tokens,
        encoder(2 * LAYERS + 2),
        eager=True,
        left={"Transpose": 0},
    ),
    "torch-decoder": Architecture(
        torch_decoder,
        hidden_and_memory,
        {"Attention": 2 * LAYERS, "LayerNormalization": 3 * LAYERS, "Gelu": LAYERS},
        left={"Transpose": 0},
    ),
    "torch-batch-first": Architecture(
        torch_encoder(True), hidden, encoder(2 * LAYERS), left={"Transpose": 0, "Reshape": 0, "Gather": 0, "Gemm": 0}
    ),
    "torch-sequence-first": Architecture(
        torch_encoder(False),
        hidden,
        encoder(2 * LAYERS),
        left={"Transpose": 2 * LAYERS, "Reshape": 0, "Gather": 0, "Gemm": 0},
    ),
    "resnet": Architecture(resnet, pixels, {}),
    "mobilenet": Architecture(mobilenet, pixels, {}),
    "unet": Architecture(unet, pixels, {"GroupNormalization": 3}),
}


FAST = {
    ("bert", "dynamo-20"),
    ("vit", "dynamo-23"),
    ("resnet", "dynamo-20"),
    ("unet", "dynamo-20"),
}
"""What is tried in every run of the tests beside all of the legacy exporter, which takes a tenth of the time.

Llama by torch's newer exporter is counted in tests/test_families.py.
"""


# Exports


def export(architecture: Architecture, how: str, path: Path) -> None:
    """Write the model to `path`: named inputs, dynamic in batch and sequence → "output"."""
    import torch

    exporter, opset = how.split("-")
    if opset == "23" and architecture.counts.get("RotaryEmbedding"):
        opset = "24"
    torch.manual_seed(0)
    model = architecture.make("eager" if exporter == "legacy" or architecture.eager else "sdpa").eval()
    randomise(model)
    if getattr(getattr(model, "config", None), "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation("batched_mm")
    sample = architecture.feeds(*SIZES[0], np.random.default_rng(0))

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: Any) -> Any:
            if not hasattr(model, "config"):
                return self.model(*given)
            return self.model(**dict(zip(sample, given, strict=True))).last_hidden_state

    axes = {name: axes_of(name, value) for name, value in sample.items()}
    options: dict[str, Any] = {"opset_version": int(opset), "input_names": list(sample), "output_names": ["output"]}
    if exporter == "dynamo":
        options |= {"dynamo": True, "dynamic_shapes": {"given": tuple(axes.values())}, "external_data": False}
    else:
        options |= {"dynamo": False, "dynamic_axes": {**axes, "output": next(iter(axes.values()))}}
        options |= {"training": torch.onnx.TrainingMode.PRESERVE}  # keeps each BatchNormalization where it stands
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own, about tracing and deprecations
        logging.disable(logging.WARNING)
        given = tuple(torch.from_numpy(value) for value in sample.values())
        torch.onnx.export(Named(), given, str(path), verbose=False, **options)
        logging.disable(logging.NOTSET)


def axes_of(name: str, value: Array) -> dict[int, str]:
    """The dynamic axes of an input."""
    if name in ("hidden_states", "memory"):
        return {}
    return {0: "batch"} if value.ndim > 2 else {0: "batch", 1: "target" if name.startswith("decoder") else "sequence"}


def randomise(model: Any) -> None:
    """Biases, norms and statistics other than the 0 and 1 that they begin with, so that none can be dropped unseen."""
    import torch

    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1 and "inv_freq" not in name:
                tensor.add_(torch.rand_like(tensor) * 0.5)


# Tests


def optimize(graph: Graph) -> None:
    """Run the passes of the recipe `optimize`."""
    context = Context()
    for step in Recipe.load("optimize").passes:
        with suppress(Skip):
            step.run(graph, context)


def counted(graph: Graph) -> dict[str, int]:
    found = Counter(node.op for scope in scopes(graph) for node in scope.nodes)
    return {op: found[op] for op in COUNTED if found[op]}


def compare(before: Graph, after: Graph, architecture: Architecture) -> None:
    one, other = Session(before), Session(after)
    for number, (batch, length) in enumerate(SIZES):
        feeds = architecture.feeds(batch, length, np.random.default_rng(number))
        (expected,), (found,) = one.run(feeds).values(), other.run(feeds).values()
        assert found.shape == expected.shape
        assert np.isfinite(expected).all()
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale, err_msg=f"{batch} x {length}")


CASES = [
    pytest.param(
        name, how, marks=() if how == "legacy-17" or (name, how) in FAST else pytest.mark.slow, id=f"{name}-{how}"
    )
    for name in ARCHITECTURES
    for how in EXPORTS
]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_architecture(name: str, how: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    export(architecture, how, tmp_path / "model.onnx")
    graph = load_model(tmp_path / "model.onnx")
    before = copy_graph(graph)
    optimize(graph)
    onnx.checker.check_model(to_model(graph), full_check=True)
    compare(before, graph, architecture)
    assert Counter(counted(graph)) == Counter(architecture.counts)  # 0 is as good as none
    found = Counter(node.op for node in graph.nodes)
    assert {op: found[op] for op in architecture.left} == architecture.left
