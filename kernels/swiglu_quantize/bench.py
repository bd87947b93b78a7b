"""SwiGLUQuantize as it is timed: shapes of Llama 1 B and 8 B with 1, 8 and 64 rows, and the same in torch."""

from __future__ import annotations

from typing import Any

import torch

SHAPES = [(rows, depth) for depth in (8192, 14336) for rows in (1, 8, 64)]
"""Rows, and values of a row."""
ATTRIBUTES: dict[str, Any] = {}


def inputs(rows: int, depth: int, device: str) -> dict[str, torch.Tensor]:
    """Fresh ones, by name."""
    return {
        "gate": torch.randn(rows, depth, dtype=torch.float16, device=device),
        "up": torch.randn(rows, depth, dtype=torch.float16, device=device),
        "scale": torch.full((1,), 0.02, device=device),
        "zero_point": torch.zeros(1, dtype=torch.int8, device=device),
    }


def outputs(rows: int, depth: int, device: str) -> dict[str, torch.Tensor]:
    """Full of what no kernel writes."""
    return {"quantized": torch.full((rows, depth), 0x55, dtype=torch.int8, device=device)}


def in_torch(gate: Any, up: Any, scale: Any, zero_point: Any) -> tuple[torch.Tensor, ...]:
    """What a user would write."""
    product = torch.nn.functional.silu(gate.float()) * up.float()
    return ((product / scale).round().clamp(-128, 127).to(zero_point.dtype),)


def moved(rows: int, depth: int) -> int:
    """Bytes that must be read and written: two tensors of float16, and one of int8."""
    return rows * depth * 5
