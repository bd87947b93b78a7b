"""llmc against its peers, in one run on one machine: nodes left, time from file to file, memory; then its flatness.

    python tests/bench [--rounds 3] [--out build/bench.json]

Every optimizer runs in a process of its own, on one CPU; its CPU seconds in the best of some rounds count. What is
compared are ratios of one run: seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
from models import EXPORTS, Generated, bert_base, export_encoder, minilm
from peers import PEERS
from tables import print_all

ENCODERS: dict[str, Callable[[str], Any]] = {"MiniLM": minilm, "BERT-base": bert_base}
TIMED = "BERT-base"
"""The model whose optimization is timed; of the other, only nodes are counted."""
SIZES = (1_000, 10_000, 100_000)
LIMIT = 600
"""Seconds that one optimizer may take."""
DISTRIBUTIONS = ("llmc-compiler", "onnx", "onnxruntime", "onnxscript", "onnxsim", "onnxslim", "polygraphy", "torch")


def measure(peer: str, source: Path, folder: Path, rounds: int, runs: int = 1) -> dict[str, Any]:
    """The fastest of `rounds` processes, each of `runs` runs: mean times and memory; where the peer fails, why."""
    worker = [sys.executable, str(Path(__file__).with_name("peers.py")), peer, str(source), str(folder / "out.onnx")]
    worker.append(str(runs))
    measured = []
    for _ in range(rounds):
        try:
            done = subprocess.run(worker, capture_output=True, text=True, timeout=LIMIT, check=True)
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {LIMIT} s"}
        except subprocess.CalledProcessError as error:
            return {"failed": (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]}
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    best: dict[str, Any] = min(measured, key=lambda run: run["work_s"])
    return best | {"nodes": sum(best["operators"].values())}


def measure_encoders(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    for name, make in ENCODERS.items():
        for export in EXPORTS:
            source = folder / f"{name}-{export}.onnx"
            export_encoder(make(export), export, source)
            nodes = onnx.load(source).graph.node
            given = sum(node.op_type != "Constant" for node in nodes)
            for peer in PEERS:
                once = name != TIMED or peer == "llmc compile"
                progress(f"{name} {export}: {peer}")
                result = measure(peer, source, folder, 1 if once else rounds)
                yield {"model": name, "export": export, "nodes_before": given, "peer": peer, **result}
            source.unlink()


def measure_sizes(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """As many nodes of each size, in one graph or many: the best moment of a busy machine would favour small ones."""
    for kind in ("chain", "dag"):
        sources = {size: folder / f"{kind}-{size}.onnx" for size in SIZES}
        for size, source in sources.items():
            onnx.save(Generated(kind, size).model(), source)
        found: dict[int, list[dict[str, Any]]] = {size: [] for size in SIZES}
        for _ in range(rounds):
            for size, source in sources.items():
                progress(f"{kind} of {size} nodes")
                found[size].append(measure("llmc", source, folder, 1, max(SIZES) // size))
        for size, source in sources.items():
            given = len(onnx.load(source).graph.node)
            best = min(found[size], key=lambda run: float(run.get("work_s", "inf")))
            yield {"kind": kind, "nodes_before": given, **best}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in DISTRIBUTIONS}
    return {"python": platform.python_version(), "cpus": len(os.sched_getaffinity(0)), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of which the fastest counts (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"), help="where the numbers go, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmc-bench-") as name:
        folder = Path(name)
        results = {
            "environment": environment(),
            "encoders": list(measure_encoders(folder, options.rounds)),
            "sizes": list(measure_sizes(folder, options.rounds)),
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_all(results)


if __name__ == "__main__":
    main()
