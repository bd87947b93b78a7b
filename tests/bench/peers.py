"""Every optimizer that is compared, each from file to file; run as a program, one of them in a process of its own.

    python tests/bench/peers.py NAME SOURCE TARGET [RUNS]

prints one line of JSON: CPU seconds that its imports and its work took (the mean of RUNS, by default one), the peak
memory of the process, and nodes that it left. It stays on one CPU, whose time counts: the machine may be busy.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import onnx

Optimize = Callable[[Path, Path], None]
HEADS = 12
"""Attention heads of MiniLM and of BERT-base."""


def llmc() -> Optimize:
    """The passes of the recipe `optimize` as a compile runs them, without verification."""
    from llmc.compiler.recipe import Recipe
    from llmc.passes.base import Context, Skip
    from llmc.passes.graph import collector_paused, load_model, save_model

    passes = Recipe.load("optimize").passes

    def optimize(source: Path, target: Path) -> None:
        with collector_paused():
            graph, context = load_model(source), Context()
            for step in passes:
                with suppress(Skip), collector_paused():
                    step.run(graph, context)
            save_model(graph, target)

    return optimize


def llmc_compile() -> Optimize:
    """What `llmc compile --recipe optimize` does: each pass checked and verified, a report written."""
    from llmc.compiler import compile as run_compile

    def optimize(source: Path, target: Path) -> None:
        folder = target.with_suffix("")
        run_compile(str(source), "optimize", folder, force=True)
        (folder / "model.onnx").rename(target)

    return optimize


def onnxslim() -> Optimize:
    import onnxslim

    return lambda source, target: onnxslim.slim(str(source), str(target)) and None


def onnxsim() -> Optimize:
    import onnxsim

    def optimize(source: Path, target: Path) -> None:
        model, _ = onnxsim.simplify(str(source))
        onnx.save(model, target)

    return optimize


def onnxscript() -> Optimize:
    import onnx_ir
    from onnxscript import optimizer

    def optimize(source: Path, target: Path) -> None:
        model = onnx_ir.load(source)
        optimizer.optimize(model)
        onnx_ir.save(model, target)

    return optimize


def polygraphy() -> Optimize:
    """What `polygraphy surgeon sanitize --fold-constants` does."""
    from polygraphy.backend import onnx as backend

    def optimize(source: Path, target: Path) -> None:
        model = backend.fold_constants(backend.onnx_from_path(str(source)))
        backend.save_onnx(model, str(target))

    return optimize


def onnxruntime() -> Optimize:
    """ONNX Runtime's own optimizations at level extended (com.microsoft operators, that TensorRT refuses)."""
    import onnxruntime as ort

    def optimize(source: Path, target: Path) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 3
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return optimize


def ort_transformers() -> Optimize:
    """ONNX Runtime's optimizer for transformers (com.microsoft operators), told the sizes that it asks for."""
    from onnxruntime.transformers import optimizer

    def optimize(source: Path, target: Path) -> None:
        vectors = [t.dims[0] for t in onnx.load(source, load_external_data=False).graph.initializer if len(t.dims) == 1]
        ((hidden_size, _),) = Counter(vectors).most_common(1)
        model = optimizer.optimize_model(str(source), "bert", num_heads=HEADS, hidden_size=hidden_size)
        model.save_model_to_file(str(target))

    return optimize


PEERS: dict[str, Callable[[], Optimize]] = {
    "llmc": llmc,
    "onnxslim": onnxslim,
    "onnxsim": onnxsim,
    "onnxscript": onnxscript,
    "polygraphy": polygraphy,
    "ort extended": onnxruntime,
    "ort transformers": ort_transformers,
    "llmc compile": llmc_compile,
}


def peak_bytes() -> int:
    """The most memory that this process ever had resident, mapped files included (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def count_nodes(path: Path) -> dict[str, int]:
    """Operator → number of nodes, Constant nodes and the insides of subgraphs left out."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return dict(Counter(node.op_type for node in nodes if node.op_type != "Constant").most_common())


def main(name: str, source: Path, target: Path, runs: int = 1) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    started = time.process_time()
    optimize = PEERS[name]()
    imported = time.process_time()
    for _ in range(runs):
        optimize(source, target)
    work = (time.process_time() - imported) / runs
    measured = {"imports_s": imported - started, "work_s": work, "peak_bytes": peak_bytes()}
    print(json.dumps(measured | {"operators": count_nodes(target)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
