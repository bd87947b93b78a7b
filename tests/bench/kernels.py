"""What the GPU kernels of kernels/ need of each GPU: compiled ahead of time, on a machine without one.

    python tests/bench/kernels.py [--operator codebook_matmul] [--sm 80 86 89 90 120] > docs/kernels.md

Registers a thread, bytes of shared memory a program, and bytes of stack, which are 0 where no register is spilled, as
the cuobjdump that triton brings reads them from the machine code. Nothing is run: times need a GPU.
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
    yield "on a GPU: there are no times.\n"
    yield "| Kernel | " + " | ".join(f"SM{sm}" for sm in capabilities) + " |"
    yield "|---|" + "---|" * len(capabilities)
    for operator, name, found in rows:
        cells = [
            f"{found[sm]['registers']} / {found[sm]['shared']} / {found[sm]['stack']}" if sm in found else "-"
            for sm in capabilities
        ]
        yield f"| {operator}, {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--operator", action="append", default=[])
    parser.add_argument("--sm", type=int, nargs="+", default=CAPABILITIES)
    options = parser.parse_args()
    rows = [
        (operator, name, {sm: resources(variant, sm) for sm in options.sm if sm >= variant[4]})
        for operator, name, variant in variants(options.operator)
    ]
    print("\n".join(table(rows, options.sm)))


if __name__ == "__main__":
    main()
