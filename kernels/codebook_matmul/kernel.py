"""CodebookMatMul in Triton: each program makes a tile of y, looking the values of W up as it goes along K."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

WORD = tl.constexpr(32)


@triton.jit
def codebook_matmul(
    x,
    packed,
    codebook,
    M,
    N,
    K,
    x_row,
    x_column,
    y_row,
    rows_of_group,
    depth_of_block,
    blocks,
    y,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y [M, N] = x [M, K] · Wᵀ; strides in elements. The sum is float32; W is rounded to nothing but its own type."""
    fields: tl.constexpr = WORD // BITS
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = packed + n.to(tl.int64) * tl.cdiv(K, fields)
    books = (n // rows_of_group) * blocks
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (k < K)[None, :]
        word = tl.load(words[:, None] + (k // fields)[None, :], mask=inside, other=0)
        index = (word >> ((k % fields) * BITS)[None, :]) & ((1 << BITS) - 1)
        book = books[:, None] + (k // depth_of_block)[None, :]
        weight = tl.load(codebook + (book << BITS) + index, mask=inside, other=0.0)
        rows = m.to(tl.int64)[:, None] * x_row + k[None, :] * x_column
        given = tl.load(x + rows, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(given, tl.trans(weight), total, input_precision="ieee")
    target = y + m.to(tl.int64)[:, None] * y_row + n[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def blocks(bits: int) -> dict[str, int]:
    """The sizes of tiles that are shipped."""
    return {"BITS": bits, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64}


OPTIONS = {"num_warps": 4, "num_stages": 2}


def plan(
    rows: Any, count: Any, depth: Any, strides: Sequence[Any], codebook: Sequence[Any], bits: int
) -> tuple[Any, ...]:
    """The grid, the numbers between inputs and outputs, constants, and options of the compiler.

    `strides` of a row of x, of a column of x and of a row of y; `codebook` is the shape.
    """
    sizes, (groups, columns, _) = blocks(bits), codebook
    m, n = sizes["BLOCK_M"], sizes["BLOCK_N"]
    numbers = (rows, count, depth, *strides, count // groups, depth // columns, columns)
    return ((count + n - 1) // n, (rows + m - 1) // m), numbers, sizes, OPTIONS


VARIANTS: dict[str, tuple[Any, dict[str, str], dict[str, int], dict[str, int], int]] = {
    f"{dtype}, {bits} bits": (
        codebook_matmul,
        {"x": f"*{dtype}", "packed": "*i32", "codebook": f"*{dtype}", "y": f"*{dtype}"}
        | dict.fromkeys(
            ["M", "N", "K", "x_row", "x_column", "y_row", "rows_of_group", "depth_of_block", "blocks"], "i32"
        ),
        blocks(bits),
        OPTIONS,
        80,
    )
    for dtype in ("fp16", "bf16", "fp32")
    for bits in (2, 3, 4, 8)
}
"""What is shipped → kernel, types of its arguments, constants, options of the compiler, the least SM that has it."""


KERNEL = codebook_matmul


def launch(x: Any, packed: Any, codebook: Any, y: Any, *, bits: int) -> None:
    """Write y [M, N], of x [M, K] with any strides, packed [N, words] and codebook [R, C, 2^bits]; torch's tensors.

    The last axis of y is contiguous.
    """
    strides = (*x.stride(), y.stride(0))
    grid, numbers, sizes, flags = plan(x.shape[0], packed.shape[0], x.shape[1], strides, codebook.shape, bits)
    codebook_matmul[grid](x, packed, codebook, *numbers, y, **sizes, **flags)
