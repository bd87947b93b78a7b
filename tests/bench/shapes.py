"""Language models of real shapes with random weights of their own, written straight to disk: larger than memory, if
need be.

    python tests/bench/shapes.py llama-7b --layers 4 --out build/llama           a Hugging Face folder
    python tests/bench/shapes.py llama-7b --layers 4 --onnx --out build/llama    model.onnx with external data

Both forms of one shape and seed have the same weights. No more than one tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from decoder_graph import decoder_graph

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK = 1 << 22
"""Values drawn at a time."""
ALIGNMENT = 4096
"""Bytes: a tensor of an external data file begins on a page."""
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's family."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    vocabulary: int
    tied: bool = False
    """Whether the embedding is the head's weight too."""
    dtype: str = "float16"

    @property
    def width(self) -> int:
        """Of a head."""
        return self.hidden // self.heads

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(self.itemsize * int(np.prod(size)) for _, size in self.weights())

    def config(self) -> dict[str, object]:
        """`config.json`, as transformers reads it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": self.dtype,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        }

    def weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes as torch has them, in the order of the model."""
        wide = self.width * self.key_value_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.input_layernorm.weight", (self.hidden,)
            yield f"{at}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{at}.self_attn.k_proj.weight", (wide, self.hidden)
            yield f"{at}.self_attn.v_proj.weight", (wide, self.hidden)
            yield f"{at}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{at}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{at}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{at}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{at}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def values(self, seed: int) -> Iterator[tuple[str, Array]]:
        """Each weight in turn: normal values of a scale that keeps activations in range; those of norms near 1."""
        for index, (name, size) in enumerate(self.weights()):
            rng = np.random.default_rng([seed, index])
            values = np.empty(int(np.prod(size)), DTYPES[self.dtype])
            for start in range(0, values.size, CHUNK):
                drawn = rng.standard_normal(min(values.size - start, CHUNK), dtype=np.float32)
                drawn = 1 + np.float32(0.1) * drawn if len(size) == 1 else drawn * np.float32(size[-1] ** -0.5)
                values[start : start + CHUNK] = drawn
            yield name, values.reshape(size)


SHAPES = {
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-1b": Shape(2048, 8192, 32, 8, 16, 32000, tied=True),
    "llama-0.5b": Shape(1024, 4096, 16, 8, 24, 32000, tied=True),
    "llama-tiny": Shape(64, 128, 4, 2, 2, 256),
}


def write_checkpoint(shape: Shape, folder: Path, seed: int = 0) -> None:
    """A Hugging Face folder: `config.json` and one `model.safetensors` (the format: safetensors README)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1), encoding="utf-8")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in shape.weights():
        begin, end = end, end + shape.itemsize * int(np.prod(size))
        header[name] = {"dtype": SAFETENSORS[shape.dtype], "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in shape.values(seed):
            file.write(values.view(np.uint8).data)


def write_onnx(shape: Shape, folder: Path, seed: int = 0) -> None:
    """`model.onnx` and `model.onnx.data`, as exporters write them: weights of products transposed to [in, out]."""
    folder.mkdir(parents=True, exist_ok=True)
    model = decoder_graph(**asdict(shape))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    with (folder / "model.onnx.data").open("wb") as file:
        for name, values in shape.values(seed):
            tensor = tensors.get(name) or tensors[f"{name}.T"]
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            entries = {"location": "model.onnx.data", "offset": file.tell(), "length": values.nbytes}
            stored = values if tensor.name == name else np.ascontiguousarray(values.T)
            file.write(stored.view(np.uint8).data)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="how many (default: the shape's own)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the weights")
    parser.add_argument("--onnx", action="store_true", help="write ONNX, not a Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    shape = replace(SHAPES[options.shape], dtype=options.dtype)
    if options.layers:
        shape = replace(shape, layers=options.layers)
    (write_onnx if options.onnx else write_checkpoint)(shape, options.out)


if __name__ == "__main__":
    main()
