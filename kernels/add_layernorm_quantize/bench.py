"""AddLayerNormQuantize as it is timed: shapes of Llama 1 B and 8 B with 1, 8 and 64 rows, and the same in torch."""

from __future__ import annotations

from typing import Any

import torch

SHAPES = [(rows, depth) for depth in (2048, 4096) for rows in (1, 8, 64)]
"""Rows, and values of a row."""
ATTRIBUTES: dict[str, Any] = {"epsilon": 1e-5}


def inputs(rows: int, depth: int, device: str) -> dict[str, torch.Tensor]:
    """Fresh ones, by name."""
    half: Any = {"dtype": torch.float16, "device": device}
    return {
        "x": torch.randn(rows, depth, **half),
        "residual": torch.randn(rows, depth, **half),
        "weight": torch.rand(depth, **half) + 0.5,
        "bias": torch.randn(depth, **half),
        "scale": torch.full((1,), 0.02, device=device),
        "zero_point": torch.zeros(1, dtype=torch.int8, device=device),
    }


def outputs(rows: int, depth: int, device: str) -> dict[str, torch.Tensor]:
    """Full of what no kernel writes."""
    return {
        "total": torch.full((rows, depth), torch.nan, dtype=torch.float16, device=device),
        "quantized": torch.full((rows, depth), 0x55, dtype=torch.int8, device=device),
    }


def in_torch(
    x: Any, residual: Any, weight: Any, bias: Any, scale: Any, zero_point: Any, *, epsilon: float
) -> tuple[torch.Tensor, ...]:
    """What a user would write."""
    total = x + residual
    wide = total.float()
    normal = torch.nn.functional.layer_norm(wide, wide.shape[-1:], weight.float(), bias.float(), epsilon)
    return total, (normal / scale).round().clamp(-128, 127).to(zero_point.dtype)


def moved(rows: int, depth: int) -> int:
    """Bytes that must be read and written: three tensors of float16, and one of int8."""
    return rows * depth * 7
