"""Symmetric round-to-nearest quantization, in blocks or in whole rows.

In a block the weight of largest magnitude is stored exactly: the scale is that weight divided by
``-2 ** (bits - 1)``, so all integers from 0 to ``2 ** bits - 1`` are used, whichever sign the
largest weight has. This is the rule of llama.cpp's Q4_0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .packing import blocks_of

__all__ = ["dequantize_blocks", "quantize_channels", "quantize_rows"]


def quantize_rows(
    weights: NDArray[np.float32], *, bits: int, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize rows.

    Args:
        weights: float32 [n, columns].
        bits: 4 or 8.
        block: Weights that share a scale.

    Returns:
        Integers, uint8 [n, blocks, block], and scales, float32 [n, blocks].
    """
    half = 1 << (bits - 1)
    blocks = blocks_of(weights, block)
    highest, lowest = blocks.max(axis=-1), blocks.min(axis=-1)
    extreme = np.where(highest > -lowest, highest, lowest)
    scales = extreme / np.float32(-half)
    # A block whose scale is 0 or so small that its inverse overflows is stored as zeros.
    usable = np.abs(scales) >= np.finfo(np.float32).tiny
    scales = np.where(usable, scales, np.float32(0))
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)
    scaled = blocks * inverse[..., None]
    np.rint(scaled, out=scaled)
    scaled += np.float32(half)
    np.clip(scaled, 0, 2 * half - 1, out=scaled)
    return scaled.astype(np.uint8), scales


def quantize_channels(
    weights: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize rows [n, columns] to 8 bits, each with one scale: ``weight = q * scale``.

    Returns:
        Integers, int8 [n, columns], and scales, float32 [n].
    """
    # -128 is left out: ARM's kernel adds two products of bytes in 16 bits, and twice -128 * -128
    # does not fit.
    scales = np.abs(weights).max(axis=1) / np.float32(127)
    usable = scales >= np.finfo(np.float32).tiny
    scales = np.where(usable, scales, np.float32(0))
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)
    scaled = weights * inverse[:, None]
    np.rint(scaled, out=scaled)
    np.clip(scaled, -127, 127, out=scaled)
    return scaled.astype(np.int8), scales


def dequantize_blocks(
    quantized: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8] | None = None,
    *,
    bits: int,
    columns: int,
) -> NDArray[np.float32]:
    """The weights that the integers stand for, float32 [n, columns].

    Args:
        quantized: uint8 [n, blocks, block].
        scales: float32 [n, blocks].
        zero_points: uint8 [n, blocks] (default: ``2 ** (bits - 1)``).
        bits: 4 or 8.
        columns: Weights of a row; what fills the last block up is left out.
    """
    zero = np.float32(1 << (bits - 1)) if zero_points is None else zero_points[..., None]
    values = (quantized.astype(np.float32) - zero) * scales[..., None]
    rows, blocks, block = values.shape
    return values.reshape(rows, blocks * block)[:, :columns]
