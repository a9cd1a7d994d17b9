"""The bit layouts of GPTQ and AWQ checkpoints: 32-bit words of 4- or 8-bit fields.

GPTQ (AutoGPTQ's ``qlinear_cuda.py``) packs neighbours along the input into a word of ``qweight``,
and neighbours along the output into a word of ``qzeros``, lowest bits first. AWQ (AutoAWQ's
``gemm.py``) packs both along the output, and a word's outputs in the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .packing import unpack

__all__ = ["awq_integers", "fields", "gptq_integers"]

# Where outputs 0 to 7 are among a word's fields.
_AWQ_FIELDS = np.array([0, 4, 1, 5, 2, 6, 3, 7])


def fields(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """The fields of words [n, m], lowest bits first, as uint8 [n, m, 32 / bits]."""
    assert np.little_endian, "safetensors are little-endian"
    return unpack(np.ascontiguousarray(words)[..., None].view(np.uint8), bits)


def gptq_integers(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Words along the input [columns * bits / 32, rows] as uint8 [columns, rows]."""
    columns = len(words) * 32 // bits
    return fields(words, bits).transpose(0, 2, 1).reshape(columns, words.shape[1])


def awq_integers(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Words along the output [columns, rows / 8] as uint8 [columns, rows]; 4 bits."""
    return fields(words, 4)[..., _AWQ_FIELDS].reshape(len(words), 8 * words.shape[1])
