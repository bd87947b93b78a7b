"""SwiGLUQuantize in Triton: one pass, each program a stretch of values."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_MAGIC = tl.constexpr(12582912.0)
"""1.5 · 2^23: added to a float32 and taken away again, it leaves the nearest whole number, ties to even."""


@triton.jit
def swiglu_quantize(gate, up, scale, zero_point, D, gate_row, up_row, quantized, BLOCK: tl.constexpr):
    """A part of a row [D]; gate and up have rows of any stride, the result is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    opened = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    levels = tl.div_rn(tl.div_rn(opened, 1.0 + tl.exp(-opened)) * given, tl.load(scale))
    if quantized.dtype.element_ty == tl.int8:
        levels = (tl.clamp(levels, -128.0, 127.0) + _MAGIC) - _MAGIC
    else:
        levels = tl.clamp(levels, -448.0, 448.0)
    tl.store(quantized + row * D + column, levels.to(quantized.dtype.element_ty), mask=inside)


BLOCK = 1024
OPTIONS = {"num_warps": 4}


def plan(rows: Any, depth: Any, gate_row: Any, up_row: Any) -> tuple[Any, ...]:
    """The grid, the numbers between inputs and outputs, constants, and options of the compiler."""
    return (rows, (depth + BLOCK - 1) // BLOCK), (depth, gate_row, up_row), {"BLOCK": BLOCK}, OPTIONS


VARIANTS: dict[str, tuple[Any, dict[str, str], dict[str, int], dict[str, int], int]] = {
    f"{dtype} → {quantized}": (
        swiglu_quantize,
        {"gate": f"*{dtype}", "up": f"*{dtype}", "scale": "*fp32"}
        | dict.fromkeys(["zero_point", "quantized"], f"*{quantized}")
        | dict.fromkeys(["D", "gate_row", "up_row"], "i32"),
        {"BLOCK": BLOCK},
        OPTIONS,
        least,
    )
    for dtype in ("fp16", "bf16")
    for quantized, least in (("i8", 80), ("fp8e4nv", 89))
}
"""What is shipped → kernel, types of its arguments, constants, options of the compiler, the least SM that has it."""


KERNEL = swiglu_quantize


def launch(gate: Any, up: Any, scale: Any, zero_point: Any, quantized: Any) -> None:
    """Write quantized [rows, D], contiguous, of gate and up [rows, D]; torch's tensors, scale of one."""
    rows, depth = gate.shape
    grid, numbers, sizes, flags = plan(rows, depth, gate.stride(0), up.stride(0))
    swiglu_quantize[grid](gate, up, scale, zero_point, *numbers, quantized, **sizes, **flags)
