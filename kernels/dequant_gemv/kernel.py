"""DequantGemv in Triton: each program sums a few rows of the weight, reading two values a byte."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def dequant_gemv(
    x,
    weight,
    scale,
    N,
    K,
    x_row,
    y_row,
    block,
    y,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y [M, N] = x [M, K] · Wᵀ, a program for each row of x and BLOCK_N rows of W; weight int8 [N, K / 2], low nibble
    first. Columns of x and y are contiguous."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = n.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K // 2, BLOCK_K):
        byte = start + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (byte < K // 2)[None, :]
        pair = tl.load(weight + rows * (K // 2) + byte[None, :], mask=inside, other=0).to(tl.int32)
        for half in tl.static_range(2):
            level = (((pair >> (4 * half)) & 15) ^ 8) - 8
            k = 2 * byte + half
            factor = tl.load(scale + rows * (K // block) + (k // block)[None, :], mask=inside, other=0.0)
            value = (level.to(tl.float32) * factor.to(tl.float32)).to(scale.dtype.element_ty).to(tl.float32)
            given = tl.load(x + m * x_row + k, mask=k < K, other=0.0).to(tl.float32)
            total += value * given[None, :]
    tl.store(y + m * y_row + n, tl.sum(total, axis=1).to(y.dtype.element_ty), mask=n < N)


SIZES = {"BLOCK_N": 8, "BLOCK_K": 256}
OPTIONS = {"num_warps": 4, "num_stages": 2}


def plan(rows: Any, count: Any, depth: Any, x_row: Any, y_row: Any, block: int) -> tuple[Any, ...]:
    """The grid, the numbers between inputs and outputs, constants, and options of the compiler."""
    size = SIZES["BLOCK_N"]
    return ((count + size - 1) // size, rows), (count, depth, x_row, y_row, block), SIZES, OPTIONS


VARIANTS: dict[str, tuple[Any, dict[str, str], dict[str, int], dict[str, int], int]] = {
    dtype: (
        dequant_gemv,
        {"x": f"*{dtype}", "weight": "*i8", "scale": f"*{dtype}", "y": f"*{dtype}"}
        | dict.fromkeys(["N", "K", "x_row", "y_row", "block"], "i32"),
        SIZES,
        OPTIONS,
        80,
    )
    for dtype in ("fp16", "bf16")
}
"""What is shipped → kernel, types of its arguments, constants, options of the compiler, the least SM that has it."""


KERNEL = dequant_gemv


def launch(x: Any, weight: Any, scale: Any, y: Any, *, block: int) -> None:
    """Write y [M, N], of x [M, K], weight int8 [N, K / 2] with the first of two values in the low nibble, and scale
    [N, K / block]; torch's tensors. The last axes of x and y are contiguous."""
    (rows, depth), count = x.shape, weight.shape[0]
    grid, numbers, sizes, flags = plan(rows, count, depth, x.stride(0), y.stride(0), block)
    dequant_gemv[grid](x, weight, scale, *numbers, y, **sizes, **flags)
