"""What the GPU kernels of kernels/ need of each GPU, compiled ahead of time on a machine without one; and their times.

    python tests/bench/kernels.py [--operator codebook_matmul] [--sm 80 86 89 90 120] > docs/kernels.md
    python tests/bench/kernels.py --times [--operator codebook_matmul]

Registers a thread, bytes of shared memory a program, and bytes of stack, which are 0 where no register is spilled, as
the cuobjdump that triton brings reads them from the machine code. `--times` needs a GPU: milliseconds, the share of the
bandwidth that a copy of as many bytes reaches in the same run (the roofline of what only moves memory), and the time
over that of `torch.compile`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as now; triton warns where nothing is said

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = Path(__file__).parents[2] / "kernels"
CAPABILITIES = (80, 86, 89, 90, 120)


def resources(variant: Sequence[Any], sm: int) -> dict[str, int]:
    """Registers, shared and stack of one kernel, and the bytes of its machine code."""
    kernel, signature, constants, options, _ = variant
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    return {
        "registers": found["REG"],
        "shared": compiled.metadata.shared,
        "stack": found["STACK"] + found["LOCAL"],
        "bytes": len(compiled.asm["cubin"]),
    }


def variants(operators: Sequence[str]) -> Iterator[tuple[str, str, Sequence[Any]]]:
    for path in sorted(KERNELS.glob("*/kernel.py")):
        if not operators or path.parent.name in operators:
            module = importlib.import_module(f"llmc.kernels.{path.parent.name}.kernel")
            yield from ((path.parent.name, name, variant) for name, variant in module.VARIANTS.items())


def table(
    rows: Sequence[tuple[str, str, Mapping[int, Mapping[str, int]]]], capabilities: Sequence[int]
) -> Iterator[str]:
    yield "# Kernels, as they are compiled\n"
    yield f"By `python tests/bench/kernels.py`, with triton {triton.__version__}. Each cell is registers a thread /"
    yield "bytes of shared memory / bytes of stack; no stack means that no register is spilled. They have not been run"
    yield "on a GPU: `python tests/bench/kernels.py --times` gives times on one.\n"
    yield "| Kernel | " + " | ".join(f"SM{sm}" for sm in capabilities) + " |"
    yield "|---|" + "---|" * len(capabilities)
    for operator, name, found in rows:
        cells = [
            f"{found[sm]['registers']} / {found[sm]['shared']} / {found[sm]['stack']}" if sm in found else "-"
            for sm in capabilities
        ]
        yield f"| {operator}, {name} | " + " | ".join(cells) + " |"


def times(operators: Sequence[str]) -> Iterator[str]:
    import torch

    yield f"On {torch.cuda.get_device_name()}, with triton {triton.__version__} and torch {torch.__version__}.\n"
    yield "| Kernel | Shape | ms | GB/s | Of a copy | Over torch.compile |"
    yield "|---|---|---|---|---|---|"
    for path in sorted(KERNELS.glob("*/bench.py")):
        if not operators or path.parent.name in operators:
            for shape, found in measured(path.parent.name):
                cells = f"{found['ms']:.4f} | {found['gb_s']:.0f} | {found['of_copy']:.2f} | {found['over_torch']:.2f}"
                yield f"| {path.parent.name} | {' × '.join(map(str, shape))} | {cells} |"


def measured(operator: str) -> Iterator[tuple[tuple[int, ...], dict[str, float]]]:
    """Of each shape of an operator's bench.py: ms, gb_s, of_copy and over_torch, on the GPU of this machine."""
    import torch
    from triton.testing import do_bench

    bench, kernel = (importlib.import_module(f"llmc.kernels.{operator}.{name}") for name in ("bench", "kernel"))
    peer = torch.compile(bench.in_torch)
    for shape in bench.SHAPES:
        given, made = bench.inputs(*shape, "cuda"), bench.outputs(*shape, "cuda")
        count = bench.moved(*shape)
        source = torch.empty(count // 2, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)

        def ours(given: Any = given, made: Any = made) -> None:
            kernel.launch(**given, **made, **bench.ATTRIBUTES)

        ms = do_bench(ours)
        copy = do_bench(lambda s=source, t=target: t.copy_(s))
        torch_ms = do_bench(lambda g=given: peer(**g, **bench.ATTRIBUTES))
        yield shape, {"ms": ms, "gb_s": count / ms / 1e6, "of_copy": copy / ms, "over_torch": ms / torch_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--operator", action="append", default=[])
    parser.add_argument("--sm", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--times", action="store_true")
    options = parser.parse_args()
    if options.times:
        print("\n".join(times(options.operator)))
        return
    rows = [
        (operator, name, {sm: resources(variant, sm) for sm in options.sm if sm >= variant[4]})
        for operator, name, variant in variants(options.operator)
    ]
    print("\n".join(table(rows, options.sm)))


if __name__ == "__main__":
    main()
