"""Tokens a second of a decoder on one CPU core, in one run: llmc's graphs, the exporter's, and transformers itself.

    python tests/bench/decoding.py [--shape 0.5b] [--prompt 16] [--tokens 8] [--rounds 3] [--out build/decoding.json]

A Llama of random weights, float32, is loaded with a growing cache. `exported` is the graph as torch.onnx wrote it,
`llmc` what the passes of `optimize` make of it, `llmc int4` that with weights of its products rounded to 4 bits in
groups of 32, for MatMulNBits. All generate greedily from the same prompt; those in float32 must give the tokens of
transformers' `generate`. Times are CPU seconds, on one thread: the models take turns, and what counts is the median
over the rounds of each round's ratio to the exporter's graph.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {
    "0.5b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "small": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8},
}
Times = tuple[list[int], float, float]
"""Tokens, seconds of the prompt, seconds of each token after the first."""


def write_model(shape: str, folder: Path) -> None:
    """A Llama with half as many key-value heads as heads, and tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = SHAPES[shape]["num_attention_heads"] // 2
    config = LlamaConfig(
        **SHAPES[shape], num_key_value_heads=heads, vocab_size=32000, tie_word_embeddings=True, dtype="float32"
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_graphs(model: Path, folder: Path, accuracy_level: int) -> dict[str, Path]:
    """Each graph in a folder of its own."""
    from llmc.compiler.loaders import load
    from llmc.compiler.recipe import Recipe
    from llmc.passes.base import Context, Skip
    from llmc.passes.graph import save_model
    from llmc.passes.precision.fuse_matmul_nbits import FuseMatmulNbits
    from llmc.passes.precision.quantize_weights import QuantizeWeights
    from llmc.passes.simplify.eliminate_dead import EliminateDead

    graph = load(str(model)).graph
    int4 = [
        QuantizeWeights(bits=4, block=32, symmetric=False, method="rtn"),
        FuseMatmulNbits(accuracy_level=accuracy_level),
        EliminateDead(),
    ]
    steps: dict[str, Any] = {"exported": [], "llmc": Recipe.load("optimize").passes, "llmc int4": int4}
    paths = {}
    for name, passes in steps.items():
        for step in passes:
            with suppress(Skip):
                step.run(graph, Context())
        paths[name] = folder / name.replace(" ", "-") / "model.onnx"
        paths[name].parent.mkdir()
        save_model(graph, paths[name])
    return paths


def onnx_runner(path: Path) -> Callable[[np.ndarray, int], Times]:
    """By the loop of `llmc generate`."""
    from llmc.compiler.generation.choosing import greedy
    from llmc.compiler.generation.onnx_decoder import open_decoder

    decoder = open_decoder(path)

    def run(prompt: np.ndarray, tokens: int) -> Times:
        begun, times, made = time.process_time(), [], []
        answer = decoder.generate(prompt, np.ones_like(prompt), greedy)
        for _ in range(tokens):
            made.append(int(next(answer)[0]))
            times.append(time.process_time())
        return made, times[0] - begun, (times[-1] - times[0]) / (tokens - 1)

    return run


def torch_runner(model: Path) -> Callable[[np.ndarray, int], Times]:
    """By transformers' `generate`, with eager attention."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(1)
    module = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:  # noqa: ARG002
            self.times.append(time.process_time())

        def end(self) -> None:
            pass

    def run(prompt: np.ndarray, tokens: int) -> Times:
        clock, begun = Clock(), time.process_time()
        ids = torch.from_numpy(prompt)
        with torch.inference_mode():
            made = module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                streamer=clock,
            )
        first, last = clock.times[1], clock.times[-1]  # the first call gives the prompt back
        return made[0, prompt.shape[1] :].tolist(), first - begun, (last - first) / (tokens - 1)

    return run


def measure(runners: dict[str, Callable[[np.ndarray, int], Times]], options: argparse.Namespace) -> dict[str, Any]:
    prompt = np.random.default_rng(0).integers(3, 32000, (1, options.prompt))
    answers = {name: run(prompt, options.tokens)[0] for name, run in runners.items()}  # and warm
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for _ in range(options.rounds):
        for name, run in runners.items():
            rounds[name].append(run(prompt, options.tokens)[1:])
    return {name: _figures(name, rounds, answers, options) for name in runners}


def _figures(
    name: str,
    rounds: dict[str, list[tuple[float, float]]],
    answers: dict[str, list[int]],
    options: argparse.Namespace,
) -> dict[str, float]:
    same = [a == b for a, b in zip(answers[name], answers["transformers"], strict=True)]
    ratios = [base / each for (_, base), (_, each) in zip(rounds["exported"], rounds[name], strict=True)]
    return {
        "prefill": options.prompt / statistics.median(first for first, _ in rounds[name]),
        "decode": 1 / statistics.median(each for _, each in rounds[name]),
        "ratio": statistics.median(ratios),
        "equal": (*same, False).index(False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--prompt", type=int, default=16, help="tokens given")
    parser.add_argument("--tokens", type=int, default=8, help="tokens made in each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accuracy-level", type=int, default=4, help="of MatMulNBits: 4 rounds activations to INT8")
    parser.add_argument("--out", type=Path, help="a JSON file of the figures")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core: llmc generate takes all it is given
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(options.shape, model)
        runners = {}
        for name, path in write_graphs(model, Path(folder), options.accuracy_level).items():
            gc.collect()
            runners[name] = onnx_runner(path)
        runners["transformers"] = torch_runner(model)
        found = measure(runners, options)
    for name, figures in found.items():
        speed = f"prefill {figures['prefill']:7.1f}, decode {figures['decode']:6.2f} tokens/s"
        print(f"{name:14}{speed}, {figures['ratio']:.2f} of the exporter's; {figures['equal']} tokens equal")
    if any(found[name]["equal"] < options.tokens for name in ("exported", "llmc")):
        raise SystemExit("in float32 a graph gives other tokens than transformers")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
