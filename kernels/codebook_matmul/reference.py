"""What CodebookMatMul computes, in float64; and how indices are packed."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
WORD = 32
"""Bits of a word."""


def pack(indices: Array, bits: int) -> Array:
    """Indices [N, K], each below 2^bits → words int32 [N, ceil(K / (32 // bits))], the first in the lowest bits."""
    rows, depth = indices.shape
    fields = WORD // bits
    padded = np.zeros((rows, -(-depth // fields), fields), np.uint32)
    padded.reshape(rows, -1)[:, :depth] = indices
    shifts = (np.arange(fields) * bits).astype(np.uint32)
    words: Array = np.bitwise_or.reduce(padded << shifts, axis=-1).view(np.int32)
    return words


def unpack(packed: Array, bits: int, depth: int) -> Array:
    """Words int32 [N, words] → indices uint8 [N, depth]."""
    shifts = (np.arange(WORD // bits) * bits).astype(np.uint32)
    fields = (packed.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return fields.reshape(len(packed), -1)[:, :depth].astype(np.uint8)


def weight(packed: Array, codebook: Array, bits: int, depth: int) -> Array:
    """W [N, depth], in the type of the codebook [R, C, 2^bits]."""
    indices = unpack(packed, bits, depth)
    groups, blocks, _ = codebook.shape
    row = np.arange(len(packed)) // (len(packed) // groups)
    column = np.arange(depth) // (depth // blocks)
    values: Array = codebook[row[:, None], column[None, :], indices]
    return values


def reference(x: Array, packed: Array, codebook: Array, *, bits: int) -> Array:
    """y [..., N] float64, of x [..., K], packed int32 [N, words] and codebook [R, C, 2^bits]."""
    matrix = weight(packed, codebook, bits, x.shape[-1]).astype(np.float64)
    product: Array = x.astype(np.float64) @ matrix.T
    return product
