"""Trains the language model of this folder: 0.9 M parameters that have learned what Python's documentation looks like.

    python tests/assets/tiny_llama/train.py [--steps 1500] [--out tests/assets/tiny_llama]

The Llama shape in small: RMSNorm, rotary positions, grouped queries (4 heads, 2 of keys and values), SwiGLU, tied
embeddings, a byte-level BPE of 1024 tokens. Widths are multiples of 128, so that every block size of quantization
divides them. Takes some 20 minutes on one core; same seed, same machine, same weights. They are stored as
bfloat16 (1.8 MB) and read as float32, as config.json says. What is here came of the 1500 steps of the default: 1.797
bits a byte of text held out, perplexity 23.99 a token.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 1024
LENGTH = 256
"""Tokens of a training sample."""
BATCH = 8
RATE = 4e-3
WARMUP = 100
"""Steps."""


def documentation() -> Any:
    """The module beside this folder that has the text."""
    spec = importlib.util.spec_from_file_location("documentation", HERE.parent / "documentation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text goes through it and back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=2 * LENGTH
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Every text's tokens with the end token before each: int64 [tokens]."""
    encode = tokenizer.backend_tokenizer.encode
    ids = [i for text in texts for i in (tokenizer.bos_token_id, *encode(text, add_special_tokens=False).ids)]
    return torch.tensor(ids)


def batches(tokens: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """`steps` batches int64 [BATCH, LENGTH + 1]: in each epoch all windows once, shuffled, from another offset."""
    generator = torch.Generator().manual_seed(0)
    windows: list[int] = []
    for _ in range(steps):
        if len(windows) < BATCH:
            offset = int(torch.randint(LENGTH, (1,), generator=generator))
            starts = torch.arange(offset, len(tokens) - LENGTH - 1, LENGTH)
            windows += starts[torch.randperm(len(starts), generator=generator)].tolist()
        yield torch.stack([tokens[start : start + LENGTH + 1] for start in windows[:BATCH]])
        del windows[:BATCH]


def learning_rate(step: int, steps: int) -> float:
    """Up in a line, down in a cosine to 0."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    return RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int) -> None:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    started = time.perf_counter()
    for step, batch in enumerate(batches(tokens, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.3f} nats a token, {time.perf_counter() - started:.0f} s", flush=True)


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, tokens: torch.Tensor, size: int) -> tuple[float, float]:
    """(bits a byte of text, perplexity a token) over windows of LENGTH tokens that do not overlap; `size` in bytes."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, LENGTH):
        window = tokens[start : start + LENGTH + 1][None]
        logits = model(window[:, :-1]).logits
        total += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    return total / math.log(2) / size, math.exp(total / count)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"  # what the weights are read as
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text = documentation()
    seen, unseen = text.training(), text.held_out()
    tokenizer = make_tokenizer(seen)
    tokens, others = encode(tokenizer, seen), encode(tokenizer, unseen)
    model = make_model(tokenizer)
    print(f"{model.num_parameters()} parameters, {len(tokens)} tokens to learn, {len(others)} held out", flush=True)
    train(model.train(), tokens, options.steps)
    save(model, tokenizer, options.out)
    stored = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32).eval()
    bits, perplexity = bits_per_byte(stored, others, sum(len(document.encode()) for document in unseen))
    print(f"held out: {bits:.3f} bits a byte, perplexity {perplexity:.2f}")


if __name__ == "__main__":
    main()
