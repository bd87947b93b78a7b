"""DequantGemv as it is timed: shapes of Llama 1 B and 8 B with 1, 8 and 64 rows, and the same in torch."""

from __future__ import annotations

from typing import Any

import torch

SHAPES = [(rows, count, depth) for count, depth in ((8192, 2048), (14336, 4096)) for rows in (1, 8)]
"""Rows of x, channels out, channels in; 64 rows are more than the kernel is made for."""
ATTRIBUTES: dict[str, Any] = {"block": 32}


def inputs(rows: int, count: int, depth: int, device: str) -> dict[str, torch.Tensor]:
    """Fresh ones, by name."""
    return {
        "x": torch.randn(rows, depth, dtype=torch.float16, device=device),
        "weight": torch.randint(-128, 128, (count, depth // 2), dtype=torch.int8, device=device),
        "scale": torch.rand(count, depth // 32, dtype=torch.float16, device=device) / 64,
    }


def outputs(rows: int, count: int, depth: int, device: str) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """Full of what no kernel writes."""
    return {"y": torch.full((rows, count), torch.nan, dtype=torch.float16, device=device)}


def in_torch(x: Any, weight: Any, scale: Any, *, block: int) -> tuple[torch.Tensor, ...]:
    """What a user would write."""
    pairs = torch.stack([(weight << 4) >> 4, weight >> 4], -1).reshape(len(weight), -1, block)
    return (x @ (pairs.to(scale.dtype) * scale[..., None]).reshape(len(weight), -1).T,)


def moved(rows: int, count: int, depth: int) -> int:
    """Bytes that must be read and written: half a byte a weight, its scales, x and y."""
    return count * depth // 2 + count * depth // 16 + 2 * rows * (count + depth)
