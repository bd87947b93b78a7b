"""What memory and time a compile of a large model takes, its weights made for the purpose.

    python tests/bench/memory.py [--shape llama-7b] [--layers 1 8 32] [--only WORD...] [--out build/bench-memory.json]

Each line is one `llmc compile` with an empty cache. Peak memory is RssAnon of the whole process tree, looked at every
20 ms; pages mapped from files, which the kernel can drop at any time, stand beside it. Times are in copies: what `cp`
of the source's weights and a sync take right before, both with the source out of the page cache. The last compile of a
source runs again inside `--limit` bytes of memory, page cache included, where control groups can be had.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from limits import Limit, find_limit
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, Shape, write_checkpoint, write_onnx

GB = 1e9
INTERVAL = 0.02
"""Seconds between two looks at memory."""
FLAT = 0.10
"""How much more the largest number of layers may take than the smallest."""


@dataclass(frozen=True)
class Job:
    """One way to compile."""

    name: str
    passes: str
    """As YAML, in flow style."""
    bar: float
    """GB of anonymous memory from an ONNX file."""
    dtype: str = "float16"
    """Of the source."""
    sources: tuple[str, ...] = ("onnx", "hf")
    cast: str = ""
    """The pass that is timed alone too, from file to file."""
    mode: str = ""
    """Of verification; '': as the command line says."""
    target: str = "onnxruntime"
    calibrated: bool = False
    """Whether on `SAMPLES` of random tokens; else on samples that llmc draws, which are short for large models."""


SAMPLES, TOKENS = 8, 64
"""Of the data that calibrated jobs are given: 512 rows of each activation."""
KEY_VALUE = ("key", "value")
JOBS = (
    Job("optimize", "[{recipe: optimize}]", 1.0),
    Job("optimize-bf16", "[{recipe: optimize}]", 1.0, dtype="bfloat16", sources=("hf",)),
    Job("convert", "[{recipe: optimize}, convert-bf16]", 2.5, cast="convert-bf16", target="onnx"),
    Job("convert-float32", "[{recipe: optimize}, convert-fp16]", 2.5, dtype="float32", cast="convert-fp16"),
    Job("int4", "[{recipe: optimize}, {quantize-weights: {method: rtn}}, eliminate-dead]", 2.5),
    Job(
        "int8",
        "[{recipe: optimize}, {quantize-int8: {calibration: {samples: 16}}}, eliminate-dead]",
        2.5,
        mode="local",
    ),
    *(
        Job(name, f"[{{recipe: optimize}}, {passes}, eliminate-dead]", 2.5, sources=("onnx",), calibrated=True)
        for name, passes in {
            "smooth": "smooth-quant, quantize-int8",
            "gptq": "{quantize-weights: {method: gptq}}",
            "awq": "{quantize-weights: {method: awq, insert_mul: true}}",
        }.items()
    ),
)
SLOWEST = 2.0
"""Copies of the source that a cast may take."""
HUGGINGFACE_BAR = 4.0
"""GB of anonymous memory, export included."""
RECIPE = """passes: {passes}
target: {{kind: {target}}}
model:
  dimensions: {{batch: [1, 1, 2], sequence: [1, 4, {longest}], past_sequence: [0, 4, 8]}}
verify: {{samples: {samples}, mode: {mode}, budgets: {{cosine: 0.5}}}}
"""
"""Verified on few tokens: what is measured is what weights take."""


@dataclass
class Use:
    """What a command took."""

    code: int
    seconds: float
    anonymous: float
    """GB, at the peak."""
    file: float
    """GB mapped from files, at its own peak."""
    at: float
    """Seconds after the start at which anonymous memory was at its peak."""
    error: str = ""


def processes(root: int) -> Iterator[int]:
    """A process and all below it."""
    yield root
    for task in Path(f"/proc/{root}/task").glob("*"):
        try:
            children = (task / "children").read_text().split()
        except OSError:  # it ended just now
            continue
        for child in children:
            yield from processes(int(child))


def resident(process: int) -> tuple[int, int]:
    """Kilobytes of a process: anonymous ones, shared among them, and those mapped from files."""
    found = {"RssAnon": 0, "RssShmem": 0, "RssFile": 0}
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0])
    except OSError:
        pass
    return found["RssAnon"] + found["RssShmem"], found["RssFile"]


def watch(command: Sequence[str], environment: dict[str, str], timeline: float = 0) -> Use:
    """Run a command, and look at the memory of its process tree until it ends."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    peak = peak_file = at = told = 0.0
    try:
        while process.poll() is None:
            pages = [resident(found) for found in processes(process.pid)]
            anonymous, mapped = (sum(one[kind] for one in pages) * 1024 / GB for kind in (0, 1))
            now = time.perf_counter() - begun
            if anonymous > peak:
                peak, at = anonymous, now
            peak_file = max(peak_file, mapped)
            if timeline and now - told >= timeline:
                told = now
                print(f"  {now:7.1f} s  {anonymous:6.2f} GB anonymous  {mapped:6.2f} GB mapped", file=sys.stderr)
            time.sleep(INTERVAL)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.stderr is not None
    error = process.stderr.read().strip() if process.returncode else ""
    return Use(process.returncode, time.perf_counter() - begun, peak, peak_file, at, error[-2000:])


def forget(folder: Path) -> None:
    """Have the files of a folder on the disk, and out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def copy_seconds(source: Path, folder: Path) -> float:
    """What `cp` of the weights takes until they are on the disk."""
    forget(source)
    weights = max((path for path in source.iterdir()), key=lambda path: path.stat().st_size)
    target = folder / "copy"
    begun = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", str(weights), str(target)], check=True)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    seconds = time.perf_counter() - begun
    os.close(descriptor)
    target.unlink()
    return seconds


def cast_seconds(key: str, source: Path, folder: Path) -> float:
    """What the pass and the writing of what it has made take."""
    forget(source)
    target = folder / "cast"
    target.mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("cast.py")), key, str(source / "model.onnx")]
    done = subprocess.run([*command, str(target / "model.onnx")], check=True, capture_output=True, text=True)
    shutil.rmtree(target)
    return float(done.stdout)


@contextmanager
def model(shape: Shape, kind: str, folder: Path) -> Iterator[Path]:
    """The source, made for the time of its use: large ones do not stand on the disk together."""
    place = folder / "source"
    shutil.rmtree(place, ignore_errors=True)
    progress(f"writing {kind} of {shape.layers} layers, {shape.dtype}: {shape.bytes / GB:.1f} GB")
    (write_onnx if kind == "onnx" else write_checkpoint)(shape, place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_samples(shape: Shape, folder: Path) -> None:
    """Sentences of random tokens, each an .npz file with every input of the graph, its caches empty."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(SAMPLES):
        ids = rng.integers(0, shape.vocabulary, (1, TOKENS))
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(TOKENS)[None]}
        nothing = np.empty((1, shape.key_value_heads, 0, shape.width), shape.dtype)
        given |= {f"past_key_values.{layer}.{part}": nothing for layer in range(shape.layers) for part in KEY_VALUE}
        np.savez(folder / f"{number}.npz", **given)


def compile_model(job: Job, source: Path, folder: Path, limit: Limit | None, options: argparse.Namespace) -> Use:
    """One compile, with an empty cache; a failed one leaves its error."""
    for name in ("cache", "out", "out.failed"):
        shutil.rmtree(folder / name, ignore_errors=True)
    recipe = folder / "recipe.yaml"
    settings = {"passes": job.passes, "target": job.target, "samples": options.samples}
    settings |= {"mode": job.mode or options.mode, "longest": TOKENS if job.calibrated else 8}
    recipe.write_text(RECIPE.format(**settings), encoding="utf-8")
    forget(source)
    command = [sys.executable, "-m", "llmc.compiler", "compile", str(source), "--recipe", str(recipe)]
    command += ["-o", str(folder / "out"), *(["--calibration", str(folder / "samples")] if job.calibrated else [])]
    environment = {**os.environ, "LLMC_CACHE": str(folder / "cache")}
    found = watch(limit.command(command) if limit else command, environment, options.timeline)
    report = folder / "out" / "report.json"
    if options.keep_reports and report.is_file():
        shutil.copy(report, options.keep_reports / f"{source.parent.name}-{job.name}.json")
    return found


def measure(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    limit = find_limit(int(options.limit))
    if limit is None:
        progress("no memory limit: none was asked for, or neither cgroups nor systemd-run are here")
    for kind in options.sources:
        for dtype in dict.fromkeys(job.dtype for job in JOBS):
            asked = options.only or [job.name for job in JOBS if not job.calibrated]
            wanted = [job for job in JOBS if kind in job.sources and job.name in asked]
            jobs = [job for job in wanted if job.dtype == dtype]
            for layers in options.layers if jobs else ():
                shape = replace(SHAPES[options.shape], layers=layers, dtype=dtype)
                if any(job.calibrated for job in jobs):
                    write_samples(shape, folder / "samples")
                with model(shape, kind, folder) as source:
                    for job in jobs:
                        copied = copy_seconds(source, folder)
                        about = {"source": kind, "layers": layers, "job": job.name, "bytes": shape.bytes}
                        about |= {"copy_seconds": copied}
                        if job.cast and kind == "onnx":
                            about |= {"cast_seconds": cast_seconds(job.cast, source, folder)}
                        for held in [None, limit] if limit and layers == max(options.layers) else [None]:
                            progress(f"{kind}, {layers} layers: {job.name}{' inside the limit' if held else ''}")
                            use = compile_model(job, source, folder, held, options)
                            yield about | {"limit": options.limit if held else None} | asdict(use)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="Peak memory and time of llmc compile", title_justify="left", header_style="dim", box=None)
    for heading in (
        "Source",
        "Layers",
        "Recipe",
        "Limit",
        "Model",
        "Anonymous",
        "of model",
        "Mapped",
        "Time",
        "Copies",
    ):
        made.add_column(heading, justify="left" if heading in ("Source", "Recipe") else "right")
    for row in rows:
        size = row["bytes"] / GB
        made.add_row(
            row["source"],
            str(row["layers"]),
            row["job"],
            f"{row['limit'] / GB:.0f} GB" if row["limit"] else "",
            f"{size:.1f} GB",
            f"{row['anonymous']:.2f} GB" if not row["code"] else f"failed ({row['code']})",
            f"{row['anonymous'] / size:.2f}",
            f"{row['file']:.1f} GB",
            f"{row['seconds']:.0f} s",
            f"{row['seconds'] / row['copy_seconds']:.1f}",
        )
    return made


def broken_bars(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Which of the bars do not hold."""
    jobs = {job.name: job for job in JOBS}
    for row in rows:
        job, called = jobs[row["job"]], f"{row['source']}, {row['layers']} layers, {row['job']}"
        bar = job.bar if row["source"] == "onnx" else HUGGINGFACE_BAR
        if row["code"]:
            yield f"{called} failed: {row['error'].splitlines()[-1] if row['error'] else row['code']}"
        elif row["anonymous"] > bar:
            yield f"{called} takes {row['anonymous']:.2f} GB, over {bar:g} GB"
        if row["limit"] is None and row.get("cast_seconds", 0) > SLOWEST * row["copy_seconds"]:
            yield f"{called}: the pass takes {row['cast_seconds'] / row['copy_seconds']:.1f} copies, over {SLOWEST:g}"
    free = [row for row in rows if row["limit"] is None and not row["code"]]
    for source, job_name in dict.fromkeys((row["source"], row["job"]) for row in free):
        peaks = [row["anonymous"] for row in free if (row["source"], row["job"]) == (source, job_name)]
        if max(peaks) > (1 + FLAT) * min(peaks):
            yield f"{source}, {job_name}: from {min(peaks):.2f} to {max(peaks):.2f} GB over the layers, over {FLAT:.0%}"


def progress(phase: str) -> None:
    print(phase, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--sources", nargs="+", choices=("onnx", "hf"), default=["onnx", "hf"])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[job.name for job in JOBS],
        help="recipes (default: all but smooth, gptq and awq, which take hours at 32 layers)",
    )
    parser.add_argument("--limit", type=float, default=6e9, help="bytes of memory of the limited runs; 0: none")
    parser.add_argument("--samples", type=int, default=1, help="that each step is verified on")
    parser.add_argument("--mode", default="final", help="of verification")
    parser.add_argument("--timeline", type=float, default=0, help="print memory every so many seconds")
    parser.add_argument("--keep-reports", type=Path, help="folder for the report of each compile")
    parser.add_argument("--folder", type=Path, default=Path("build/bench-memory"), help="where models are made")
    parser.add_argument("--out", type=Path, help="JSON with what was measured")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in measure(options, options.folder):
        rows.append(row)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(rows))
    broken = list(broken_bars(rows))
    for line in broken:
        console.print(f"over: {line}")
    for row in (row for row in rows if row["limit"] is None and "cast_seconds" in row):
        copies = row["cast_seconds"] / row["copy_seconds"]
        console.print(f"{row['job']}, {row['layers']} layers: the pass from file to file takes {copies:.1f} copies")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
