"""INT8 by llmc and by its peers, in one run: how far MiniLM's embeddings move, and the time ONNX Runtime takes.

    python tests/bench/quantization.py [--modelopt PYTHON] [--only NAME] [--out build/bench-int8.json]

Each quantizer gets the same 128 sentences, one a sample, and where it cannot take samples of different lengths the same
ones padded. What counts is 500 other sentences. Times are CPU seconds of ONNX Runtime with its default optimizations
on one thread: the models take turns, and what counts is the median over the rounds of each round's ratio to the float
model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from models import bert_base, export_encoder, minilm
from quantizers import QUANTIZERS
from rich.console import Console
from rich.table import Table
from sentences import agreement, calibration_sentences, docstring_sentences, embeddings, tokenize

EXPORT = "legacy-17"
"""The spelling that every quantizer takes."""
MEASURED = 500
PADDED = 40
"""Tokens: more than the longest calibration sentence has."""
BATCH, TOKENS = 8, 64
LIMIT = 1800
"""Seconds that one quantizer may take."""


def save_samples(samples: list[dict[str, Any]], folder: Path) -> Path:
    folder.mkdir()
    for number, sample in enumerate(samples):
        np.savez(folder / f"{number:04}.npz", **sample)
    return folder


def quantize(name: str, interpreter: str, source: Path, target: Path, samples: Path) -> str | None:
    """Run one quantizer in a process of its own; None, or why it failed."""
    worker = [interpreter, str(Path(__file__).with_name("quantizers.py")), name]
    target.parent.mkdir(exist_ok=True)
    try:
        command = [*worker, str(source), str(target), str(samples)]
        subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    except subprocess.TimeoutExpired:
        return f"took longer than {LIMIT} s"
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1][:160]
    return None


class Runner:
    """A model in ONNX Runtime, one thread, default optimizations."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def __call__(self, feeds: Any) -> dict[str, Any]:
        values = self.session.run(self.outputs, {name: feeds[name] for name in self.inputs})
        return dict(zip(self.outputs, values, strict=True))


def seconds(runners: dict[str, Runner], rounds: int) -> dict[str, list[float]]:
    """The CPU seconds of each run of each model at [BATCH, TOKENS]; the models take turns."""
    ids = np.random.default_rng(0).integers(1000, 20000, (BATCH, TOKENS))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds + 2):
        for name, run in runners.items():
            started = time.process_time()
            run(feeds)
            if number > 1:  # the first runs make buffers
                taken[name].append(time.process_time() - started)
    return taken


def measure(model: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Quantize `model` with all quantizers and measure what they made."""
    print(f"{model}: exporting", file=sys.stderr, flush=True)
    source = folder / f"{model}.onnx"
    export_encoder({"MiniLM": minilm, "BERT-base": bert_base}[model](EXPORT), EXPORT, source)
    sentences = calibration_sentences()[: 128 if model == "MiniLM" else 16]
    ragged = save_samples(tokenize(sentences), folder / f"{model}-ragged")
    padded = save_samples(tokenize(sentences, PADDED), folder / f"{model}-padded")
    rows: list[dict[str, Any]] = [{"model": model, "quantizer": "float"}]
    runners = {"float": Runner(source)}
    for name in options.only or QUANTIZERS:
        interpreter = options.modelopt if name.startswith("modelopt") else sys.executable
        if interpreter is None:
            continue
        print(f"{model}: {name}", file=sys.stderr, flush=True)
        row: dict[str, Any] = {"model": model, "quantizer": name}
        target = folder / f"{model}-{name.replace(' ', '-')}" / "model.onnx"
        failed = quantize(name, interpreter, source, target, ragged)
        if failed is not None:
            row["ragged"] = failed
            failed = quantize(name, interpreter, source, target, padded)
        if failed is None:
            runners[name] = Runner(target)
            row["bytes"] = sum(file.stat().st_size for file in target.parent.glob("model.onnx*"))
        else:
            row["failed"] = failed
        rows.append(row)
    if model == "MiniLM":
        samples = tokenize(docstring_sentences(MEASURED))
        expected = embeddings(runners["float"], samples)
        for row in rows[1:]:
            if row["quantizer"] in runners:
                row |= agreement(expected, embeddings(runners[row["quantizer"]], samples))
    taken = seconds(runners, options.rounds)
    for row in rows:
        if row["quantizer"] in taken:
            mine = taken[row["quantizer"]]
            row["seconds"] = statistics.median(mine)
            row["ratio"] = statistics.median(a / b for a, b in zip(mine, taken["float"], strict=True))
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title=f"{rows[0]['model']} in INT8, [{BATCH}, {TOKENS}] tokens (1.00 x: float)", title_justify="left")
    for column in ("quantizer", "cosine", "Spearman", "time", "MB", ""):
        made.add_column(column, justify="left" if column in ("quantizer", "") else "right", max_width=60)
    for row in rows:
        if "failed" in row:
            made.add_row(row["quantizer"], "", "", "", "", f"failed: {row['failed']}")
            continue
        accuracy = [f"{row[key]:.4f}" if key in row else "" for key in ("cosine", "spearman")]
        size = f"{row['bytes'] / 1e6:.0f}" if "bytes" in row else ""
        note = f"padded samples: {row['ragged']}" if "ragged" in row else ""
        made.add_row(row["quantizer"], *accuracy, f"{row['ratio']:.2f} x", size, note)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modelopt", help="Python that has nvidia-modelopt[onnx]; left out: not compared")
    parser.add_argument("--only", action="append", choices=list(QUANTIZERS), help="this quantizer; may be repeated")
    parser.add_argument("--model", action="append", choices=["MiniLM", "BERT-base"], help="may be repeated")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each model (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("build/bench-int8.json"), help="where the numbers go, as JSON")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="llmc-bench-") as name:
        results = [measure(model, Path(name), options) for model in options.model or ["MiniLM", "BERT-base"]]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 140)
    for rows in results:
        console.print(table(rows))


if __name__ == "__main__":
    main()
