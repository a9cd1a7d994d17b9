"""The storage of block-quantized matrices that MatMulNBits and GatherBlockQuantized read.

A matrix [rows, columns] is cut along its columns into blocks of ``block`` weights, the last one
filled up with zeros. A block is stored as ``block * bits / 8`` bytes, low nibble first at 4 bits,
and one float32 scale: ``weight = (q - zero_point) * scale``. Zero points are ``2 ** (bits - 1)``
throughout, or a tensor of their own: ``bits`` bits a block, those of a row packed as weights are.
Source: ONNX Runtime's contrib operators, ``com.microsoft.MatMulNBits``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Blocks", "block_count", "blocks_of", "pack", "unpack"]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Some rows of a matrix as blocks of integers.

    Attributes:
        integers: uint8 [n, blocks, block], each below ``2 ** bits``.
        scales: float32 [n, blocks].
        zero_points: uint8 [n, blocks].
    """

    integers: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8]


def block_count(columns: int, block: int) -> int:
    """Blocks in a row of ``columns`` weights."""
    return -(-columns // block)


def blocks_of(weights: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Cut rows [n, columns] into blocks [n, blocks, block], padding the last with zeros."""
    rows, columns = weights.shape
    blocks = block_count(columns, block)
    if columns % block:
        padded = np.zeros((rows, blocks * block), np.float32)
        padded[:, :columns] = weights
        weights = padded
    return weights.reshape(rows, blocks, block)


def pack(quantized: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack integers [..., block], each below ``2 ** bits``, into bytes [..., block * bits / 8]."""
    if bits == 8:
        return quantized
    low, high = quantized[..., 0::2], quantized[..., 1::2]
    packed: NDArray[np.uint8] = low | (high << np.uint8(4))
    return packed


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of :func:`pack`."""
    if bits == 8:
        return packed
    quantized = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    quantized[..., 0::2] = packed & 15
    quantized[..., 1::2] = packed >> 4
    return quantized
