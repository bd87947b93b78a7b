"""AddRMSNormQuantize in Triton: each program reads a row once and writes both results."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_MAGIC = tl.constexpr(12582912.0)
"""1.5 · 2^23: added to a float32 and taken away again, it leaves the nearest whole number, ties to even."""


@triton.jit
def add_rmsnorm_quantize(
    x,
    residual,
    weight,
    scale,
    zero_point,
    D,
    x_row,
    residual_row,
    total,
    quantized,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row [D] of each tensor; x and residual have rows of any stride, the results are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    added = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + row * D + column, rounded, mask=inside)
    wide = rounded.to(tl.float32)
    root = tl.sqrt_rn(tl.sum(wide * wide, axis=0) / D + EPSILON)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    levels = tl.div_rn(tl.div_rn(wide, root) * factor, tl.load(scale))
    if quantized.dtype.element_ty == tl.int8:
        levels = (tl.clamp(levels, -128.0, 127.0) + _MAGIC) - _MAGIC
    else:
        levels = tl.clamp(levels, -448.0, 448.0)
    tl.store(quantized + row * D + column, levels.to(quantized.dtype.element_ty), mask=inside)


def constants(depth: int, epsilon: float) -> dict[str, Any]:
    return {"EPSILON": epsilon, "BLOCK": triton.next_power_of_2(depth)}


def options(block: int) -> dict[str, int]:
    """Eight values a thread, up to sixteen warps."""
    return {"num_warps": min(16, max(1, block // 256))}


def plan(rows: Any, depth: int, x_row: Any, residual_row: Any, epsilon: float) -> tuple[Any, ...]:
    """The grid, the numbers between inputs and outputs, constants, and options of the compiler."""
    sizes = constants(depth, epsilon)
    return (rows,), (depth, x_row, residual_row), sizes, options(sizes["BLOCK"])


BLOCKS = (512, 2048, 4096, 8192)
VARIANTS: dict[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, int], int]] = {
    f"{dtype} → {quantized}, D ≤ {block}": (
        add_rmsnorm_quantize,
        dict.fromkeys(("x", "residual", "weight"), f"*{dtype}")
        | {"scale": "*fp32", "zero_point": f"*{quantized}", "total": f"*{dtype}", "quantized": f"*{quantized}"}
        | dict.fromkeys(["D", "x_row", "residual_row"], "i32"),
        constants(block, 1e-6),
        options(block),
        least,
    )
    for dtype in ("fp16", "bf16")
    for quantized, least in (("i8", 80), ("fp8e4nv", 89))
    for block in BLOCKS
}
"""What is shipped → kernel, types of its arguments, constants, options of the compiler, the least SM that has it."""


KERNEL = add_rmsnorm_quantize


def launch(
    x: Any, residual: Any, weight: Any, scale: Any, zero_point: Any, total: Any, quantized: Any, *, epsilon: float
) -> None:
    """Write total and quantized [rows, D], contiguous, of x and residual [rows, D]; torch's tensors, scale of one."""
    rows, depth = x.shape
    grid, numbers, sizes, flags = plan(rows, depth, x.stride(0), residual.stride(0), epsilon)
    add_rmsnorm_quantize[grid](x, residual, weight, scale, zero_point, *numbers, total, quantized, **sizes, **flags)
