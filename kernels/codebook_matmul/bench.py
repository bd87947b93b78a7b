"""CodebookMatMul as it is timed: shapes of Llama 1 B and 8 B with 1, 8 and 64 rows, and the same in torch."""

from __future__ import annotations

from typing import Any

import torch

SHAPES = [(rows, count, depth) for count, depth in ((8192, 2048), (14336, 4096)) for rows in (1, 8, 64)]
"""Rows of x, channels out, channels in."""
ATTRIBUTES: dict[str, Any] = {"bits": 4}


def inputs(rows: int, count: int, depth: int, device: str) -> dict[str, torch.Tensor]:
    """Fresh ones, by name."""
    least, most = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    return {
        "x": torch.randn(rows, depth, dtype=torch.float16, device=device),
        "packed": torch.randint(least, most, (count, depth // 8), dtype=torch.int32, device=device),
        "codebook": torch.randn(1, 1, 16, dtype=torch.float16, device=device) / 64,
    }


def outputs(rows: int, count: int, depth: int, device: str) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """Full of what no kernel writes."""
    return {"y": torch.full((rows, count), torch.nan, dtype=torch.float16, device=device)}


def in_torch(x: Any, packed: Any, codebook: Any, *, bits: int) -> tuple[torch.Tensor, ...]:
    """What a user would write, of one codebook."""
    shifts = torch.arange(0, 32, bits, device=packed.device)
    indices = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return (x @ codebook.flatten()[indices].reshape(len(packed), -1).T,)


def moved(rows: int, count: int, depth: int) -> int:
    """Bytes that must be read and written: half a byte a weight, x and y."""
    return count * depth // 2 + 2 * rows * (count + depth)
